"""Sends messages from host 1 to host 0 after a silence and prints what the link took.

    lab_link_probe.py SIZE COUNT SILENCE_S

Every lab process shares one monotonic clock, so the times are one way: from the first byte handed
to the socket to the last one read. Host 0 prints one JSON list of seconds.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
import time

STAMP = struct.Struct("d")


def read_exactly(link: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = link.recv(size - len(data))
        if not part:
            raise EOFError
        data += part
    return data


def main() -> None:
    size, count, silence = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    if os.environ["RANK"] == "0":
        link, _ = socket.create_server(address).accept()
        times = []
        for _ in range(count):
            message = read_exactly(link, size)
            times.append(time.monotonic() - STAMP.unpack_from(message)[0])
        print(json.dumps(times))
        return
    while True:
        try:
            link = socket.create_connection(address)
            break
        except ConnectionRefusedError:
            time.sleep(0.01)
    for _ in range(count):
        time.sleep(silence)
        link.sendall(STAMP.pack(time.monotonic()).ljust(size, b"x"))
    link.shutdown(socket.SHUT_WR)
    link.recv(1)


if __name__ == "__main__":
    main()
