"""Nodes that start before their scheduler, where the system gives four ports to connections and the scheduler's is one of them.

To be run in a network namespace of its own, by test_cluster.py. The argument: 1 with a token, 0 without.
"""
import fcntl
import secrets
import socket
import struct
import sys
from pathlib import Path

from test_cluster import PATIENCE, Job, start_nodes_first

from lapse import ipc

SIOCSIFFLAGS, IFF_UP = 0x8914, 1


def main():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as interfaces:
        fcntl.ioctl(interfaces, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", IFF_UP))
    Path("/proc/sys/net/ipv4/ip_local_port_range").write_text("40000 40003", "ascii")
    folder = ipc.Folder()
    job = Job(2, {"join_timeout": PATIENCE}, secrets.token_hex(8) if sys.argv[1] == "1" else None, folder.path)
    job.port = 40002        # the kernel takes ports of the first one's parity first
    try:
        start_nodes_first(job)
    finally:
        job.end()
        folder.remove()


main()
