"""A carrier over Flower's grid: rounds as messages pushed to SuperNodes and replies pulled from them.

Comes in: assignments. Goes out: events. One flat array (the packed message that devices with equal arrays share) and
one manifest a message. A SuperNode does one message after another, so an offer that was given up cannot be called back:
its answer is not fetched, and the device's agent ends the work itself once the message is too old.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedspine_edge.errors import FedSpineError, IncompatibleError
from fedspine_edge.protocol import Assignment
from fedspine_edge.wire_format import MAX_MESSAGE_BYTES, pack, to_bytes, unpack, update_from_bytes
from fedspine_server.carriers import Event, Failed, Inventory, Joined, Left, Result

POLL_SECONDS = 0.25
LOOK_SECONDS = 2.0  # between two questions to SuperLink which nodes are connected
ASK_AGAIN_SECONDS = 10.0  # a node whose agent was not up yet is asked again

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Sent:
    """A message on its way: to which node, and the assignment in it; none for a question what the node has."""

    node_id: int
    at: float
    device_id: str = ""
    round_index: int = -1


class FlowerCarrier:
    """A carrier over Flower's grid.

    Args:
        grid: Flower's.
        recipe: Classes and prompt, which devices need to prepare their data.
        ttl_seconds: How long a message and its answer are kept.
    """

    def __init__(self, grid: Grid, recipe: Mapping[str, Any], *, ttl_seconds: float) -> None:
        self._grid = grid
        self._recipe = recipe
        self._ttl_seconds = ttl_seconds
        self._sent: dict[str, _Sent] = {}
        self._nodes: dict[int, str] = {}
        self._known: dict[str, Inventory] = {}
        self._asked: dict[int, float] = {}
        self._happened: list[Event] = []
        self._looked_at = -LOOK_SECONDS

    def inventory(self) -> Mapping[str, Inventory]:
        """Returns what is known of the devices whose nodes are connected; asks those that are new."""
        self._look()
        return {name: self._known[name] for name in self._nodes.values()}

    def offer(self, assignments: Sequence[Assignment]) -> None:
        """Pushes one message a device; one whose node is away counts as failed."""
        self._forget({(one.device_id, one.round_index) for one in assignments})
        nodes = {name: node_id for node_id, name in self._nodes.items()}
        frames: dict[bytes, tuple[bytes, str]] = {}
        messages = []
        for one in assignments:
            message = to_bytes(shared(one))
            if message not in frames:
                frame = pack(message)
                frames[message] = (frame, hashlib.sha256(frame).hexdigest())
            frame, sha256 = frames[message]
            sent = _Sent(nodes.get(one.device_id, 0), time.monotonic(), one.device_id, one.round_index)
            blob = {"sha256": sha256, "num_bytes": len(frame), "message_bytes": len(message)}
            messages.append((self._message(sent.node_id, "train", self._task(one, blob), frame), sent))
        self._push(messages)

    def cancel(self, device_id: str, round_index: int) -> None:
        """Forgets a message: its reply is not pulled."""
        self._forget({(device_id, round_index)})

    def events(self, seconds: float) -> Sequence[Event]:
        """Pulls replies and looks after nodes until something has happened or the time is over."""
        limit = time.monotonic() + seconds
        while True:
            if time.monotonic() - self._looked_at >= LOOK_SECONDS:
                self._look()
            found = self._pull()
            happened, self._happened = [*self._happened, *found], []
            left = limit - time.monotonic()
            if happened or left <= 0:
                return happened
            time.sleep(min(POLL_SECONDS, left))

    def _forget(self, offers: Set[tuple[str, int]]) -> None:
        self._sent = {k: one for k, one in self._sent.items() if (one.device_id, one.round_index) not in offers}

    def _look(self) -> None:
        online = set(self._grid.get_node_ids())
        self._looked_at = now = time.monotonic()
        for node_id in sorted(self._nodes.keys() - online):
            logger.info("left device=%s node=%d", self._nodes[node_id], node_id)
            self._happened.append(Left(self._nodes.pop(node_id)))
        silent = [n for n in sorted(online - self._nodes.keys()) if now >= self._asked.get(n, now)]
        self._asked |= dict.fromkeys(silent, now + self._ttl_seconds)
        self._push([(self._message(node_id, "query", {}, None), _Sent(node_id, now)) for node_id in silent])

    def _message(self, node_id: int, kind: str, task: Mapping[str, Any], frame: bytes | None) -> Message:
        content = RecordDict({"manifest": ConfigRecord({"task": json.dumps(task)})})
        if frame is not None:
            flat = Array(np.frombuffer(frame, dtype=np.uint8))
            content["frame"] = ArrayRecord({"frame": flat})
        return Message(content, dst_node_id=node_id, message_type=kind, ttl=self._ttl_seconds)

    def _task(self, one: Assignment, blob: Mapping[str, Any]) -> dict[str, Any]:
        own = (one.run_id, one.round_index, one.device_id, one.seed, blob["sha256"])
        return {
            "task_id": hashlib.sha256(repr(own).encode()).hexdigest()[:32],
            **{name: getattr(one, name) for name in ("run_id", "device_id", "round_index", "base_sha256", "rank")},
            **{
                name: getattr(one, name)
                for name in ("pruning_ratio", "num_steps", "seed", "budget_seconds", "min_steps")
            },
            "attempt": 0,
            "lease_seconds": self._ttl_seconds,
            "chunk_bytes": MAX_MESSAGE_BYTES,
            "max_update_bytes": MAX_MESSAGE_BYTES,
            "blob": dict(blob),
            "recipe": dict(self._recipe),
        }

    def _push(self, messages: Sequence[tuple[Message, _Sent]]) -> None:
        reachable = [pair for pair in messages if pair[1].node_id]
        for number, (_, sent) in enumerate(pair for pair in messages if not pair[1].node_id):
            self._sent[f"away {sent.device_id} {sent.round_index} {number}"] = sent
        if not reachable:
            return
        ids = list(self._grid.push_messages([message for message, _ in reachable]))
        for message_id, (_, sent) in zip(ids, reachable, strict=True):
            self._sent[message_id or f"refused {sent.node_id} {sent.round_index}"] = sent

    def _pull(self) -> list[Result | Failed]:
        found: list[Result | Failed] = []
        unsent = [name for name in self._sent if " " in name]
        for name in unsent:
            sent = self._sent.pop(name)
            if sent.device_id:
                found.append(Failed(sent.device_id, sent.round_index, "its node is not connected"))
        replies = self._grid.pull_messages(list(self._sent)) if self._sent else ()
        for reply in replies:
            answered = self._sent.pop(reply.metadata.reply_to_message_id, None)
            if answered is None:
                continue
            event = self._event(answered, reply)
            if event is not None:
                found.append(event)
        return found

    def _event(self, sent: _Sent, reply: Message) -> Result | Failed | None:
        try:
            if reply.has_error():
                raise IncompatibleError(f"Flower says: {reply.error.reason}")
            answer = json.loads(str(reply.content["manifest"]["answer"]))
            if "inventory" in answer:
                self._learn(sent.node_id, answer["inventory"])
            if not sent.device_id:
                return None
            if answer.get("failure"):
                return Failed(sent.device_id, sent.round_index, str(answer["failure"])[:400])
            frame = reply.content["frame"]["frame"].numpy().tobytes()
            update = update_from_bytes(unpack(frame, max_bytes=MAX_MESSAGE_BYTES))
            return Result(sent.device_id, sent.round_index, update, time.monotonic() - sent.at)
        except (FedSpineError, KeyError, ValueError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"[:400]
        if not sent.device_id:
            logger.warning("node did not say what it has node=%s reason=%s", sent.node_id, reason)
            self._asked[sent.node_id] = time.monotonic() + ASK_AGAIN_SECONDS
            return None
        return Failed(sent.device_id, sent.round_index, reason)

    def _learn(self, node_id: int, said: Mapping[str, Any]) -> None:
        """A device that was started anew comes as another node: the newest one is it."""
        name = str(said["device_id"])
        if self._nodes.get(node_id) != name:
            logger.info("joined device=%s node=%d", name, node_id)
            self._happened.append(Joined(name))
        self._nodes = {node: known for node, known in self._nodes.items() if known != name}
        self._nodes[node_id] = name
        self._known[name] = Inventory(
            num_examples=int(said["num_examples"]),
            memory_bytes=int(said["memory_bytes"]),
            base_sha256=str(said["base_sha256"]),
            facts=dict(said["facts"]),
        )


def shared(assignment: Assignment) -> Assignment:
    """Returns an assignment without what is one device's own, so that devices with equal arrays share one array."""
    return dataclasses.replace(
        assignment, device_id="", pruning_ratio=0.0, num_steps=1, seed=0, budget_seconds=None, min_steps=1
    )
