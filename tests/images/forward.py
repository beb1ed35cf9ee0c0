"""One connection of the guest to a port of this machine: qemu starts this with the guest's bytes on stdin, stdout."""

import os
import socket
import sys
import threading

server = socket.create_connection(("127.0.0.1", int(sys.argv[1])))


def upwards() -> None:
    while data := os.read(0, 1 << 16):
        server.sendall(data)
    server.shutdown(socket.SHUT_WR)


threading.Thread(target=upwards, daemon=True).start()
while data := server.recv(1 << 16):
    view = memoryview(data)
    while view:
        view = view[os.write(1, view) :]
