"""CURVE keys: one pair per member of a job, who may know which of them, and the files that hold them.

A node holds its own pair and the scheduler's public key; the scheduler holds its own pair and all nodes' public keys, in order of rank,
and hands those to the nodes when the job begins. So a member admits members alone, and knows by its key which rank a peer has.
"""
from __future__ import annotations

import contextlib
import json
import os
import secrets
import stat
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import zmq
from zmq.utils import z85

from lapse.errors import LapseError

KEY_TEXT = 40               # characters of a key in Z85
KEY_BYTES = 32
MAX_FILE = 8 << 20          # bytes; the scheduler's with 65,534 nodes has less than 3 MB
SCHEDULER_FILE = "scheduler.key"


def require_curve() -> None:
    """Raise LapseError where libzmq was built without CURVE."""
    if not zmq.has("curve"):
        raise LapseError("security 'curve': the libzmq that pyzmq uses was built without CURVE; install pyzmq from a wheel")


def decode(text: object) -> bytes:
    """The 32 bytes of a key in Z85; ValueError for anything else."""
    if not isinstance(text, str) or len(text) != KEY_TEXT:
        raise ValueError(f"a key has {KEY_TEXT} characters")
    try:
        key = z85.decode(text.encode("ascii"))
    except (ValueError, KeyError, struct.error):    # of characters, or of five that say more than 32 bits
        raise ValueError("a key is not in Z85") from None
    if len(key) != KEY_BYTES:
        raise ValueError("a key is not in Z85")
    return key


@dataclass(frozen=True)
class Keys:
    """What one member of a job knows. All keys are in Z85."""

    public: str
    secret: str = field(repr=False)
    rank: int | None = None         # None: the scheduler
    scheduler: str = ""             # a node knows the scheduler's public key ...
    nodes: tuple[str, ...] = ()     # ... and the scheduler the nodes', by rank

    def __post_init__(self):
        for key in (self.public, self.secret, *([self.scheduler] if self.rank is not None else self.nodes)):
            decode(key)
        if self.rank is None and not self.nodes:
            raise ValueError("the scheduler's keys name no node")
        if len(set(self.nodes)) != len(self.nodes):
            raise ValueError("two nodes have the same key")
        require_curve()
        if zmq.curve_public(self.secret.encode()).decode() != self.public:
            raise ValueError("the public key does not belong to the secret one")

    def to_text(self) -> str:
        """One line of JSON, which holds the secret."""
        if self.rank is None:
            other: dict = {"nodes": list(self.nodes)}
        else:
            other = {"rank": self.rank, "scheduler": self.scheduler}
        return json.dumps({"public": self.public, "secret": self.secret, **other})

    @classmethod
    def parse(cls, text: str, source: str) -> Keys:
        """Keys out of what to_text has made; ValueError that names the source, and never shows the text."""
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError):
            fields = None
        names = set(fields) if isinstance(fields, dict) else set()
        try:
            if names == {"public", "secret", "nodes"} and isinstance(fields["nodes"], list):
                return cls(fields["public"], fields["secret"], nodes=tuple(map(str, fields["nodes"])))
            if names == {"public", "secret", "rank", "scheduler"} and type(fields["rank"]) is int and fields["rank"] >= 0:
                return cls(**fields)
        except ValueError as error:
            raise ValueError(f"{source} does not hold the keys of a member of a job: {error}") from None
        raise ValueError(f"{source} does not hold the keys of a member of a job (python -m lapse keys makes them)")


def make(nodes: int) -> tuple[list[Keys], Keys]:
    """New keys of all nodes, and of the scheduler."""
    require_curve()
    pairs = [tuple(key.decode() for key in zmq.curve_keypair()) for _ in range(nodes + 1)]
    public, secret = pairs.pop()
    return ([Keys(*pair, rank=rank, scheduler=public) for rank, pair in enumerate(pairs)],
            Keys(public, secret, nodes=tuple(pair[0] for pair in pairs)))


class Secrets(NamedTuple):
    """What a launcher makes for one job: keys for everybody, or a token."""

    token: str | None
    nodes: list[Keys]
    scheduler: Keys | None

    @classmethod
    def make(cls, nodes: int, security: str | None) -> Secrets:
        if security == "curve":
            return cls(None, *make(nodes))
        return cls(secrets.token_hex(16), [], None)

    def environment(self, rank: int) -> dict[str, str]:
        """The variable that hands a node its secret; the node takes it out of its environment."""
        if self.nodes:
            return {"LAPSE_SECRET_KEYS": self.nodes[rank].to_text()}
        return {"LAPSE_TOKEN": self.token or ""}


# -- files

def read_file(path: str) -> Keys:
    """The keys in a file (LAPSE_KEYS); ValueError when it cannot be read, or when others than its owner can."""
    try:
        with Path(path).open("rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ValueError(f"LAPSE_KEYS {path}: not a file")
            if status.st_mode & 0o077:
                raise ValueError(f"LAPSE_KEYS {path}: others than its owner may use it (mode {status.st_mode & 0o777:04o}); chmod 400 it, "
                                 "and make new keys if others could read it")
            data = file.read(MAX_FILE + 1)
    except OSError as error:
        raise ValueError(f"LAPSE_KEYS {path}: {error.strerror}") from None
    if len(data) > MAX_FILE:
        raise ValueError(f"LAPSE_KEYS {path}: larger than {MAX_FILE} bytes")
    return Keys.parse(data.decode(errors="replace"), f"LAPSE_KEYS {path}")


def write_files(folder: str, nodes: int) -> list[Path]:
    """Make keys for a job and write one file for each member into `folder`, mode 0400; the paths, the scheduler's first.

    Raises LapseError, and then leaves no file, when one is there already or cannot be written.
    """
    members, scheduler = make(nodes)
    files = {SCHEDULER_FILE: scheduler, **{f"node-{keys.rank}.key": keys for keys in members}}
    written: list[Path] = []
    try:
        Path(folder).mkdir(mode=0o700, exist_ok=True)
        for name, keys in files.items():
            path = Path(folder, name)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400)
            written.append(path)
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                file.write(keys.to_text() + "\n")
    except BaseException as error:
        for path in written:
            with contextlib.suppress(OSError):
                path.unlink()
        if isinstance(error, FileExistsError):
            raise LapseError(f"{error.filename} is there already; keys are never overwritten") from None
        if isinstance(error, OSError):
            raise LapseError(f"cannot write keys into {folder}: {error.strerror}") from None
        raise
    return written


def main(argv: Sequence[str]) -> int:
    """`python -m lapse keys -s N FOLDER`; returns the exit code."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="python -m lapse keys", allow_abbrev=False,
        description="Make the CURVE keys of one job whose processes are started by hand: a file for the scheduler and one for each "
                    "node, which only their owner may read. Bring each member its own file, by a safe way, and name it in LAPSE_KEYS.")
    parser.add_argument("-s", "--num-servers", type=int, required=True, metavar="N", help="number of nodes")
    parser.add_argument("folder", metavar="FOLDER", help="where to write the files; made if it is not there")
    options = parser.parse_args(argv)
    if not 1 <= options.num_servers <= 65534:
        parser.error(f"-s {options.num_servers}: must be in [1, 65534]")
    try:
        paths = write_files(options.folder, options.num_servers)
    except LapseError as error:
        parser.error(str(error))
    print(f"wrote {paths[0]} and {paths[1]}" + (f" to {paths[-1].name}" if len(paths) > 2 else ""))
    return 0
