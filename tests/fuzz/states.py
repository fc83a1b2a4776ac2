"""The beds' states, and real messages for them: three nodes and their workers, who do what a seed tells them.

`python tests/fuzz/states.py FOLDER` writes the messages, one file per input. The same numbers give the same beds and inputs everywhere.
"""
from __future__ import annotations

import random
import struct
import sys
from collections import defaultdict, deque
from pathlib import Path

import numpy as np

from tests.fuzz import _bed, _door, _mutator

PULL, PUSH, SET, LOCALIZE = range(1, 5)
KEYS, NODES, WORKERS = 12, 3, 2
BEDS = 48
MOST_KEYS = 4                   # of a call
LENGTHS = np.arange(KEYS, dtype=np.uint32) % 4 + 1


def settings_of(number: int) -> dict:
    """Uniform and mixed lengths; plain, with location caches, with shared memory off."""
    way = number // 2 % 3
    lengths = {"visible": LENGTHS, "stored": LENGTHS + LENGTHS % 2} if number % 2 else {"visible": 2, "stored": 3}
    return {"dtype": "float32", "location_caches": way == 1, "shared_memory": way != 2, **lengths}


class Cluster:
    """Three nodes in memory. Who does what next is drawn, and so is the instant at which `settle` is to stop."""

    def __init__(self, number: int):
        self.draw = random.Random(number)
        self.post: list = []
        self.nodes = [_bed.Bed(rank, self.post, **settings_of(number)) for rank in range(NODES)]
        self.channels: dict = defaultdict(deque)
        self.localizes = self.draw.choice([20, 40, 60])
        self.slow = self.draw.choice([1, 2, 5])         # workers' calls per delivery

    def collect(self) -> None:
        for src, dest, frame in self.post:
            self.channels[src, dest].append(frame)
        self.post.clear()

    def call(self, rank: int) -> None:
        draw = self.draw
        kind = LOCALIZE if draw.randrange(100) < self.localizes else draw.choice([PULL, PUSH, SET])
        keys = [draw.randrange(KEYS) for _ in range(draw.randint(1, MOST_KEYS))]
        if kind == LOCALIZE:
            keys = sorted(set(keys))
        values = b""
        if kind in (PUSH, SET):
            size = self.nodes[rank].value_bytes(keys) // 4
            values = struct.pack(f"<{size}f", *(draw.randrange(100) for _ in range(size)))
        self.nodes[rank].call(draw.randrange(WORKERS), kind, keys, values)
        self.collect()

    def deliver(self, only=None) -> tuple[int, int, bytes] | None:
        """One message of a channel that has some."""
        full = [ends for ends in sorted(self.channels) if self.channels[ends] and (only is None or ends[1] in only)]
        if not full:
            return None
        src, dest = self.draw.choice(full)
        frame = self.channels[src, dest].popleft()
        self.nodes[dest].take(frame, src)
        self.collect()
        return src, dest, frame

    def step(self, callers=range(NODES)) -> tuple[int, int, bytes] | None:
        if self.draw.randrange(1 + self.slow):
            self.call(self.draw.choice(list(callers)))
            return None
        return self.deliver()


def grow(number: int) -> tuple[Cluster, int]:
    """The cluster of a bed, stopped, and the rank of its node."""
    cluster = Cluster(number)
    for _ in range(cluster.draw.choice([6, 15, 30, 60])):
        cluster.step()
    return cluster, number // 6 % NODES


def make_places() -> list:
    """The beds, and the doors (authenticated and not) behind them; once per process."""
    if not _mutator.all_places():
        for number in range(BEDS):
            cluster, rank = grow(number)
            cluster.nodes[rank].freeze()
            _mutator.put(cluster.nodes[rank])
        for authenticated in (True, False):
            _mutator.put(_door.Door(authenticated))
    return _mutator.all_places()


def futures(number: int, how_many: int) -> list[bytes]:
    """Inputs for a bed: what really came next, in so many ways in which it could have gone on."""
    inputs = []
    for future in range(how_many):
        cluster, rank = grow(number)
        cluster.draw = random.Random(1000 * number + future)
        others = [other for other in range(NODES) if other != rank]
        frames = b""
        for _ in range(200):
            message = cluster.step(callers=others)
            if message is not None and message[1] == rank:
                src, _, frame = message
                if src == rank:         # its own channel, which nobody else can write to; what follows depends on that
                    break
                frames += struct.pack("<BH", (src - rank - 1) % NODES, len(frame)) + frame
                if frames.count(b"LPSE") >= 4:
                    break
        if frames:
            inputs.append(bytes([number]) + frames)
    return sorted(set(inputs))


def at_the_door(data: bytes, number: int) -> bytes:
    """The frames of an input for a bed, as node 1 could have sent them to a door."""
    out, at, seq = bytes([number]), 1, 0
    while at < len(data):
        size = struct.unpack_from("<H", data, at + 1)[0]
        frame, at, seq = bytearray(data[at + 3:at + 3 + size]), at + 3 + size, seq + 1
        struct.pack_into("<QI", frame, 16, seq, 1)
        out += struct.pack("<BH", 7, size) + frame
    return out


def corpus(how_many: int = 6) -> list[bytes]:
    """Inputs to begin with: real messages only, and none of them may be refused."""
    inputs = [data for number in range(BEDS) for data in futures(number, how_many)]
    return inputs + [at_the_door(data, number) for number in (BEDS, BEDS + 1) for data in inputs[:8]]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for at, data in enumerate(corpus()):
        (folder / f"{at:04}").write_bytes(data)
