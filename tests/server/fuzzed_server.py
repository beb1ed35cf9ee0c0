"""A server process over a directory, for tests that watch it from outside: fuzzed_server.py DIRECTORY SOCKET"""

import socket
import sys
from pathlib import Path

import uvicorn
from link_world import QUICK

from fedspine_server.link.app import create_app
from fedspine_server.link.hub import open_hub

if __name__ == "__main__":
    hub = open_hub(Path(sys.argv[1]), settings=QUICK)
    config = uvicorn.Config(create_app(hub), log_level="warning", lifespan="on", timeout_graceful_shutdown=1)
    uvicorn.Server(config).run([socket.socket(fileno=int(sys.argv[2]))])
