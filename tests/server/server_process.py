"""A server process, link and page, that tests watch from outside: server_process.py DIRECTORY SOCKET [DATABASE]"""

import logging
import socket
import sys
from pathlib import Path

import uvicorn
from link_world import QUICK

from fedspine_server.link.app import create_app
from fedspine_server.link.hub import open_hub
from fedspine_server.page.app import Front, create_page
from fedspine_server.page.fleet_source import FleetSource

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    directory, descriptor, *database = sys.argv[1:]
    hub = open_hub(Path(directory), database=database[0] if database else None, settings=QUICK)
    front = Front(create_app(hub), create_page(FleetSource(hub), hub))
    config = uvicorn.Config(front, log_level="warning", lifespan="on", timeout_graceful_shutdown=1)
    uvicorn.Server(config).run([socket.socket(fileno=int(descriptor))])
