"""What the nodes of a job and the campaign tell each other: a small file that all of them map into memory.

It outlives every process, so that it says in which phase a process was when it died. Standard library only: a node opens it before it
imports anything that takes time.
"""
import mmap
import struct
import time
from pathlib import Path

# What a node is doing. `up` comes between joining and the next one.
IMPORTING, JOINING, UP, TRAINING, BARRIER, STORM, BULK, SHUTDOWN, END = range(1, 10)
PHASES = {"importing": IMPORTING, "joining": JOINING, "training": TRAINING, "barrier": BARRIER, "storm": STORM, "bulk": BULK,
          "shutdown": SHUTDOWN}

# What a node is told to do: break a connection, so that both ends see it, or so that it just falls silent; end badly.
CUT, SILENCE, RAISE, EXIT = range(1, 5)
ORDERS = {"cut": CUT, "silence": SILENCE, "raise": RAISE, "exit": EXIT}

MOST_NODES = 8
_NODE = struct.Struct("=qqqq")      # pid, phase, order, when the phase began (nanoseconds of time.monotonic)


class Board:
    """`Board(path, create=True)` makes the file."""

    def __init__(self, path, *, create=False):
        path = Path(path)
        if create:
            path.write_bytes(bytes(MOST_NODES * _NODE.size))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), MOST_NODES * _NODE.size)

    def enter(self, rank, pid, phase):
        """Say what this node does from now on."""
        struct.pack_into("=q", self._memory, rank * _NODE.size + 24, time.monotonic_ns())
        struct.pack_into("=q", self._memory, rank * _NODE.size, pid)
        struct.pack_into("=q", self._memory, rank * _NODE.size + 8, phase)

    def order(self, rank, order):
        struct.pack_into("=q", self._memory, rank * _NODE.size + 16, order)

    def pid(self, rank):
        return self._read(rank)[0]

    def phase(self, rank):
        return self._read(rank)[1]

    def ordered(self, rank):
        return self._read(rank)[2]

    def _read(self, rank):
        return _NODE.unpack_from(self._memory, rank * _NODE.size)
