"""`python -m fedspine_edge.appliance WORD`: what a unit of the image does.

`healthy`, `spare`, `update`, `distrust`, `wifi FILE`, `check`; on a Jetson `unpack FOLDER`.
"""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fedspine_edge.appliance import check, runtimes, slots, updates, wifi
from fedspine_edge.errors import FedSpineError, LinkError, UsageError

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
        "unpack": lambda rest: sys.stdout.write(f"{runtimes.unpack(Path(rest[0]))}\n"),
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
    """Waits for the server; a release on trial waits only so long, then its unit has the board start again.

    Raises:
        LinkError: The release on trial was not answered in its time.
    """
    given = re.search(r"\bfedspine\.trial_seconds=(\d+)\b", Path("/proc/cmdline").read_text())
    seconds = float(given[1]) if given else TRIAL_SECONDS
    limit = time.monotonic() + seconds if slots.on_trial(slots.this_board()) else float("inf")
    while not HEARD.exists():
        if time.monotonic() > limit:
            raise LinkError(
                f"expected an answer of the server within {seconds:.0f} s of this release's start, found none"
            )
        time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    main()
