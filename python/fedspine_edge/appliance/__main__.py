"""`python -m fedspine_edge.appliance healthy | spare | wifi FILE | check`: one word a unit of the image."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

from fedspine_edge.appliance import check, slots, wifi
from fedspine_edge.errors import FedSpineError, UsageError

HEARD = Path("/run/fedspine/heard")
CONFIG = Path("/config/fedspine.toml")
POLL_SECONDS = 1.0


def main() -> None:
    """Does what its first argument says."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    word, *rest = sys.argv[1:] or [""]
    try:
        if word == "healthy":
            while not HEARD.exists():
                time.sleep(POLL_SECONDS)
        elif word == "spare":
            slots.keep_spare(slots.this_board())
        elif word == "wifi":
            wifi.write_settings(CONFIG, Path(rest[0]))
        elif word == "check":
            check.try_out(CONFIG, HEARD)
        else:
            raise UsageError(f"expected healthy, spare, wifi FILE or check, found {word!r}")
    except FedSpineError as error:
        logging.getLogger(__name__).error("%s; %s", error, error.hint or "")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
