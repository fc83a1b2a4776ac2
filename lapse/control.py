"""The messages between the nodes and the scheduler: JSON, one frame each, every field checked on arrival.

| message  | from -> to        | means                                                                          |
|----------|-------------------|--------------------------------------------------------------------------------|
| join     | node -> scheduler | I am here; this is my host, process and description                            |
| welcome  | scheduler -> node | everybody is here; your rank, the job's number, the members and their keys     |
| bound    | node -> scheduler | my PULL socket listens at these endpoints                                      |
| table    | scheduler -> node | the endpoints of all nodes, by rank                                            |
| arrive   | node -> scheduler | this member has arrived at the barrier of this group                           |
| release  | scheduler -> node | all have arrived at the barrier; the members of this node that did              |
| missing  | scheduler -> node | a barrier has waited long for these members                                    |
| retire   | node -> scheduler | this member counts as arrived at all later barriers of its group               |
| enlist   | node -> scheduler | a retired member is back                                                       |
| compare  | node -> scheduler | data to be handed to all                                                       |
| compared | scheduler -> node | the data of all nodes                                                          |
| fail     | node -> scheduler | the job cannot go on                                                           |
| failed   | scheduler -> node | the root cause; the job is over                                                |
| refused  | scheduler -> node | you cannot join, for this reason                                               |
| leave    | node -> scheduler | normal end                                                                     |
| bye      | scheduler -> node | it is noted                                                                    |
"""
from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import NamedTuple

from lapse import keys

VERSION = 2
MAX_BYTES = 16 << 20  # of one message
MAX_NAME = 4096
MAX_DEPTH = 8         # of tables and lists in each other: whoever prints or compares them must not run out of stack
MAX_THREADS = 65536   # of a node: the scheduler has a name for each


class Failure(NamedTuple):
    """The root cause of a job's end; `errors.NodeFailure(*failure)` raises it."""

    rank: int | None
    host: str
    pid: int
    cause: str
    noticed_by: str


class Malformed(ValueError):
    """A frame that is not a message of this protocol."""


_HALF = re.compile("[\ud800-\udfff]")
_IPC = re.compile(r"ipc:///[^\x00-\x1f\x7f]{1,98}\Z")
_TCP = re.compile(r"tcp://(\d{1,3}(\.\d{1,3}){3}|\[[0-9a-fA-F:.]{2,45}(%[\w.-]{1,16})?\]):\d{1,5}\Z")


def _text(value) -> bool:
    """Characters that can be written down (JSON can also name halves of some)."""
    return isinstance(value, str) and len(value) <= MAX_NAME and (value.isascii() or not _HALF.search(value))


def _line(value) -> bool:
    """A text that does to a log or a terminal what it seems to."""
    return _text(value) and value.isprintable()


def _whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**64


def _seconds(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e9


def _endpoints(value) -> bool:
    return (isinstance(value, dict) and 0 < len(value) <= 2 and set(value) <= {"ipc", "tcp"}
            and all(isinstance(v, str) and (_IPC if k == "ipc" else _TCP).match(v) for k, v in value.items()))


def _list_of(check: Callable) -> Callable:
    return lambda value: isinstance(value, list) and all(check(entry) for entry in value)


def _member(value) -> bool:
    return (isinstance(value, dict) and set(value) == {"rank", "host", "place", "pid", "key"} and _whole(value["rank"])
            and _line(value["host"]) and _line(value["place"]) and _whole(value["pid"]) and _key(value["key"]))


def _key(value) -> bool:
    """A public key in Z85, or nothing."""
    if value == "":
        return True
    try:
        keys.decode(value)
    except ValueError:
        return False
    return True


def _maybe(check: Callable) -> Callable:
    return lambda value: value is None or check(value)


def _table(value) -> bool:
    return isinstance(value, dict) and all(_text(name) for name in value) and _shallow(value, MAX_DEPTH)


def _shallow(value, depth: int) -> bool:
    if isinstance(value, (dict, list)):
        return depth > 0 and all(_shallow(entry, depth - 1) for entry in (value.values() if isinstance(value, dict) else value))
    return (not isinstance(value, float) or math.isfinite(value)) and (not isinstance(value, str) or _text(value))


_FAILURE = {"rank": _maybe(_whole), "host": _line, "pid": _whole, "cause": _text, "noticed_by": _text}
_SCHEMA: dict[str, dict[str, Callable]] = {
    "join": {"version": _whole, "nodes": _whole, "threads": _whole, "host": _line, "place": _line, "pid": _whole,
             "hint": _maybe(_whole), "description": _table, "join_timeout": _seconds, "barrier_warning": _seconds},
    "welcome": {"rank": _whole, "job": _whole, "pid": _whole, "members": _list_of(_member)},
    "bound": {"endpoints": _endpoints},
    "table": {"endpoints": _list_of(_endpoints)},
    "arrive": {"group": _line, "member": _line},
    "release": {"group": _line, "members": _list_of(_line)},
    "missing": {"group": _line, "members": _list_of(_line), "seconds": _seconds},
    "retire": {"member": _line},
    "enlist": {"member": _line},
    "compare": {"name": _line, "data": _table},
    "compared": {"name": _line, "data": _list_of(_table)},
    "fail": {"rank": _maybe(_whole), "how": lambda value: value in ("said", "lost"), "cause": _text},
    "failed": _FAILURE,
    "refused": {"reason": _text},
    "leave": {},
    "bye": {},
}


def encode(kind: str, **fields) -> bytes:
    """One frame. Long texts are cut and halves of characters replaced, so that what this side says is always legal on the other."""
    for name, value in fields.items():
        if isinstance(value, str):
            value = value if len(value) <= MAX_NAME else value[:MAX_NAME - 3] + "..."
            fields[name] = _HALF.sub("?", value)
    return json.dumps({"type": kind, **fields}, separators=(",", ":")).encode()


def decode(frames: list[bytes]) -> dict:
    """The message in `frames`; raise Malformed unless it is exactly one known message with exactly its fields."""
    if len(frames) != 1 or len(frames[0]) > MAX_BYTES:
        raise Malformed(f"{len(frames)} frames" if len(frames) != 1 else f"{len(frames[0])} bytes")
    try:
        message = json.loads(frames[0].decode())
    except (ValueError, RecursionError):
        raise Malformed("not JSON") from None
    kind = message.get("type") if isinstance(message, dict) else None
    schema = _SCHEMA.get(kind) if isinstance(kind, str) else None
    if schema is None:
        raise Malformed("not a known message")
    if set(message) != {"type", *schema}:
        raise Malformed(f"{kind} with other fields than its own")
    for name, check in schema.items():
        if not check(message[name]):
            raise Malformed(f"{kind} with a bad {name}")
    return message
