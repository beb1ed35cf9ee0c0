"""`python -m fedspine_edge.appliance WORD`: what a unit of the image does.

`healthy`, `spare`, `update`, `distrust`, `wifi FILE`, `check`.
"""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fedspine_edge.appliance import check, slots, updates, wifi
from fedspine_edge.errors import FedSpineError, UsageError

HEARD = Path("/run/fedspine/heard")
CONFIG = Path("/config/fedspine.toml")
POLL_SECONDS = 1.0
TRIAL_SECONDS = 1800.0
"""How long a new release has until the server has answered; the kernel's line may say `fedspine.trial_seconds=`."""

logger = logging.getLogger(__name__)


def main() -> None:
    """Does what its first argument says."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    words: dict[str, Callable[[Sequence[str]], object]] = {
        "healthy": lambda _: _wait_until_heard(),
        "spare": lambda _: slots.keep_spare(slots.this_board()),
        "update": lambda _: updates.update(CONFIG, slots.this_board(), restart=updates.restart_when_idle),
        "distrust": lambda _: slots.distrust(slots.this_board()),
        "wifi": lambda rest: wifi.write_settings(CONFIG, Path(rest[0])),
        "check": lambda _: check.try_out(CONFIG, HEARD),
    }
    word, *rest = sys.argv[1:] or [""]
    try:
        if word not in words:
            raise UsageError(f"expected one of {', '.join(words)}, found {word!r}")
        words[word](rest)
    except FedSpineError as error:
        logger.error("%s; %s", error, error.hint or "")
        sys.exit(error.exit_code)


def _wait_until_heard() -> None:
    """Waits for the server; a release on trial that waits too long goes, and in the end the good slot is back."""
    given = re.search(r"\bfedspine\.trial_seconds=(\d+)\b", Path("/proc/cmdline").read_text())
    limit = time.monotonic() + (float(given[1]) if given else TRIAL_SECONDS)
    on_trial = slots.on_trial(slots.this_board())
    while not HEARD.exists():
        if on_trial and time.monotonic() > limit:
            logger.error("this release was not answered in its time; starting again")
            subprocess.run(["systemctl", "--no-block", "reboot"], check=True)
            sys.exit(1)  # else this boot would be good
        time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    main()
