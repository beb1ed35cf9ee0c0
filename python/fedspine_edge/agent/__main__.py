"""`python -m fedspine_edge.agent STATE`: the agent as a service; small, for it is always there.

It imports neither torch nor numpy nor the command line's libraries.
"""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path

from fedspine_edge.agent.identity import load_identity
from fedspine_edge.agent.loop import Agent
from fedspine_edge.agent.settings import load_settings
from fedspine_edge.errors import FedSpineError, UsageError
from fedspine_edge.systemd import Pulse, notify

PATIENCE_SECONDS = 180.0  # a call may wait for a slow answer so long


def main() -> None:
    """Runs the agent of a state directory until it is stopped or dismissed."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    state = Path(sys.argv[1])
    try:
        identity, settings = load_identity(state), load_settings(state)
        if identity is None or not identity.enrolled:
            raise UsageError(f"expected an enrolled device in {state}", hint="fedspine join URL --token T")
        pulse = Pulse(PATIENCE_SECONDS)
        pulse.start()
        notify("READY=1")
        Agent(state, identity, settings, beat=pulse.beat).run()
    except FedSpineError as error:
        logging.getLogger(__name__).error("agent ends: %s; %s", error, error.hint or "")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
