"""`python -m fedspine_edge.agent STATE [FEDSPINE_TOML]`: the agent as a service; small, for it is always there.

With a provisioned image's file it first becomes a device of the fleet, however long the server takes to be there. It
imports neither torch nor numpy nor the command line's libraries.
"""

from __future__ import annotations

import logging
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from fedspine_edge.agent.enrolment import Claim, enrol, load_claim
from fedspine_edge.agent.identity import load_identity
from fedspine_edge.agent.link import UnreachableError
from fedspine_edge.agent.loop import Agent
from fedspine_edge.agent.settings import load_settings
from fedspine_edge.errors import FedSpineError, UsageError
from fedspine_edge.systemd import Pulse, notify

PATIENCE_SECONDS = 180.0  # a call may wait for a slow answer so long
ENROL_AGAIN_SECONDS = 10.0


class Stop:
    """What SIGTERM does: ends the agent at once, and again at its next beat where that was lost.

    An exception that a signal's handler raises in a finaliser, which may run anywhere, is printed and forgotten.

    Args:
        beat: What a beat does otherwise.
    """

    def __init__(self, beat: Callable[[], None]) -> None:
        self._beat = beat
        self.asked = False

    def on_signal(self, *_: object) -> None:
        """Ends the agent; once it ends, nothing disturbs it."""
        if not self.asked:
            self.asked = True
            sys.exit(0)

    def beat(self) -> None:
        """Ends the agent that was asked to, else beats."""
        if self.asked:
            sys.exit(0)
        self._beat()


def main() -> None:
    """Runs the agent of a state directory until it is stopped or dismissed."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    state, claims = Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]]
    try:
        pulse = Pulse(PATIENCE_SECONDS)
        stop = Stop(pulse.beat)
        signal.signal(signal.SIGTERM, stop.on_signal)
        pulse.start()
        notify("READY=1")
        for claim in claims:
            _become_device(state, load_claim(claim), stop.beat)
        identity, settings = load_identity(state), load_settings(state)
        if identity is None or not identity.enrolled:
            raise UsageError(f"expected an enrolled device in {state}", hint="fedspine join URL --token T")
        Agent(state, identity, settings, beat=stop.beat).run()
    except FedSpineError as error:
        logging.getLogger(__name__).error("agent ends: %s; %s", error, error.hint or "")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def _become_device(state: Path, claim: Claim, beat: Callable[[], None]) -> None:
    """Enrols, unless that was done on an earlier start; a token is good for one server, an identity for ever."""
    identity = load_identity(state)
    if identity is not None and identity.enrolled:
        return
    while True:
        beat()
        try:
            device_id = enrol(claim.url, claim.token, state, claim.settings, name=claim.name)
        except UnreachableError as error:
            logging.getLogger(__name__).warning("not enrolled yet reason=%s", error)
            time.sleep(ENROL_AGAIN_SECONDS * random.uniform(0.5, 1.0))
        else:
            logging.getLogger(__name__).info("enrolled device=%s", device_id)
            return


if __name__ == "__main__":
    main()
