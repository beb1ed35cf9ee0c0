"""Flower's ClientApp: hands what a SuperNode was sent to this device's own agent, and its answer back.

Flower starts a new process for each message. The base model is not loaded here but stays in the agent (`fedspine flower
device`), which is called over the Unix socket that `--node-config 'agent="PATH"'` names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedspine_edge.agent.local_call import call
from fedspine_edge.errors import FedSpineError, UsageError

app = ClientApp()


@app.query()
def inventory(message: Message, context: Context) -> Message:
    """Answers what this device has."""
    return _reply(message, context, {"kind": "inventory"}, b"")


@app.train()
def tune(message: Message, context: Context) -> Message:
    """Answers with this device's update."""
    task = json.loads(str(message.content["manifest"]["task"]))
    frame = message.content["frame"]["frame"].numpy().tobytes()
    return _reply(message, context, {"kind": "tune", "task": task}, frame)


def _reply(message: Message, context: Context, header: dict[str, Any], content: bytes) -> Message:
    """An agent that cannot be called is an answer too: the server then knows at once, and why."""
    try:
        answer, update = call(_agent_path(context), header, content)
    except FedSpineError as error:
        answer, update = {"failure": f"{error}; {error.hint}"}, b""
    reply = RecordDict({"manifest": ConfigRecord({"answer": json.dumps(answer)})})
    if update:
        reply["frame"] = ArrayRecord({"frame": Array(np.frombuffer(update, dtype=np.uint8))})
    return Message(reply, reply_to=message)


def _agent_path(context: Context) -> Path:
    if "agent" not in context.node_config:
        raise UsageError(
            "expected the agent's socket in the node's configuration, found none",
            hint="flower-supernode --node-config 'agent=\"/var/lib/fedspine/agent.sock\"'",
        )
    return Path(str(context.node_config["agent"]))
