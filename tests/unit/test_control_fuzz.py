"""Control messages that nobody should send, drawn by Hypothesis: a decoder that takes or refuses, a coordinator that never breaks."""
from __future__ import annotations

import json
import sys

import pytest

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lapse import control, keys
from lapse.coordinator import Coordinator

EVERY_TIME = settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
KEY = keys.make(1)[0][0].public if keys.zmq.has("curve") else ""

texts = st.text(max_size=20) | st.sampled_from(
    ["0/0", "1/0", "2/1", "0", "1", "workers", "nodes", "ready", "x" * 4097, "\ud800", "\x1b[2J", "é"])
numbers = st.integers() | st.sampled_from([0, 1, 2, 3, 65536, 65537, 2**31, 2**63, 2**64 - 1, 2**64, -1, True]) | st.floats()
values = st.recursive(st.none() | numbers | texts, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
                      max_leaves=8)
endpoints = st.fixed_dictionaries({}, optional={
    "ipc": st.sampled_from(["ipc:///x/a", "ipc://x", "ipc:///" + "y" * 99]),
    "tcp": st.sampled_from(["tcp://127.0.0.1:80", "tcp://[::1]:80", "tcp://x:1", "tcp://1.2.3.4:99999"])})
members = st.fixed_dictionaries({
    "rank": numbers, "host": texts, "place": texts, "pid": numbers, "key": st.sampled_from(["", KEY, "short", None])})
RIGHT = {"endpoints": endpoints | st.lists(endpoints, max_size=3), "members": st.lists(members, max_size=3) | st.lists(texts, max_size=3),
         "hint": st.none() | st.integers(-1, 3), "rank": st.none() | st.integers(0, 3), "how": st.sampled_from(["said", "lost"]),
         "version": st.just(control.VERSION), "nodes": st.just(2), "threads": st.integers(1, 3) | st.just(2**31), "pid": st.integers(0, 9),
         "host": st.sampled_from(["a", "b"]), "place": st.just("p"), "join_timeout": st.sampled_from([0.1, 5.0]), "reason": texts,
         "cause": texts, "barrier_warning": st.sampled_from([0.1, 5]),
         "group": st.sampled_from(["nodes", "ready", "workers", "x"]), "noticed_by": texts,
         "member": st.sampled_from(["0", "1", "0/0", "1/0", "1/1", "2/0"]), "name": st.sampled_from(["a", "b"]) | texts,
         "description": st.dictionaries(texts, values, max_size=2), "seconds": st.floats(0.1, 9), "job": st.integers(1, 2**63),
         "data": st.dictionaries(texts, values, max_size=3) | st.lists(st.dictionaries(texts, values, max_size=2), max_size=2)}


def message_of(kind: str, right: float = 0.9):
    """A message of a kind: every field what it mostly is, or anything."""
    def field(name: str):
        return st.integers(0, 99).flatmap(lambda draw: RIGHT[name] if name in RIGHT and draw < 100 * right else values)

    return st.fixed_dictionaries({"type": st.just(kind), **{name: field(name) for name in control._SCHEMA[kind]}})


messages = st.sampled_from(sorted(control._SCHEMA)).flatmap(message_of)
from_nodes = st.sampled_from(
    ["join", "join", "bound", "arrive", "arrive", "retire", "enlist", "compare", "fail", "leave"]).flatmap(message_of)


def decoded(text: bytes) -> dict | None:
    try:
        message = control.decode([text])
    except control.Malformed as error:
        assert len(str(error)) < 200
        return None
    assert set(message) == {"type", *control._SCHEMA[message["type"]]}
    return message


@EVERY_TIME
@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
@example(b"")
@example(b"[" * 100_000)
@example(b'{"type":' * 50_000)
@example(b'{"type":"leave","x":' + b"[" * 100_000)
@example(b"9" * 5000)
@example(b'{"type":"leave"}'.decode().encode("utf-16"))
@example(b'{"type":"leave"}\0')
@example(b'{"type":["leave"]}')
@example(b"\xff\xfe")
def test_any_bytes(text):
    decoded(text)


@EVERY_TIME
@given(messages, st.data())
def test_messages_with_something_wrong(message, data):
    text = json.dumps(message)
    got = decoded(text.encode())
    if got is not None:                                     # what is taken can be sent on
        fields = {name: value for name, value in got.items() if name != "type"}
        assert decoded(control.encode(got["type"], **fields)) is not None
        repr(got).encode()                                  # and written down
    changed = bytearray(text.encode())
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    decoded(bytes(changed))
    decoded(text.encode()[:data.draw(st.integers(0, len(text)))])


def test_what_is_refused():
    def compare(data: str) -> bytes:
        return b'{"type":"compare","name":"x","data":' + data.encode() + b"}"

    assert decoded(compare('{"a": [[1.5, {"b": "c"}]]}')) is not None
    deep = "[" * 7
    assert decoded(compare('{"a":' + deep + "1" + "]" * 7 + "}")) is not None
    for depth in (8, 9, 200, sys.getrecursionlimit() - 200, 5000):
        assert decoded(compare('{"a":' + "[" * depth + "]" * depth + "}")) is None
    for wrong in ("NaN", "Infinity", "-Infinity", "1e999", '"\\ud800"', "1" * 5000, '1}, "more": {"b": 2'):
        assert decoded(compare('{"a":' + wrong + "}")) is None
    for member in ("0/0\n", "\x1b[31m0/0", "0/\u202e0", "0\x000"):
        assert decoded(control.encode("retire", member=member)) is None
    assert decoded(control.encode("fail", rank=None, how="said", cause="line\nline \ud800")) is not None


def judge(sent: list, log: list) -> None:
    """What the coordinator says is legal, and bounded by what it was told."""
    for peer, kind, fields in sent:
        assert control.decode([control.encode(kind, **fields)])["type"] == kind, (peer, kind)
    assert len(sent) <= 10 * len(log) + 10


@EVERY_TIME
@given(st.lists(st.tuples(st.sampled_from("abcd"), from_nodes | st.just("lost") | st.just("garbage"), st.floats(0, 2)), max_size=25),
       st.booleans(), st.booleans())
def test_a_coordinator_never_breaks(events, launched, begun):
    """Two nodes and some strangers say anything, in any order."""
    sent: list = []
    core = Coordinator(2, lambda peer, kind, fields: sent.append((peer, kind, fields)), pid=1, launched=launched)
    now = 0.0
    if begun:
        for rank, peer in enumerate("ab"):
            core.message(peer, {"type": "join", "version": control.VERSION, "nodes": 2, "threads": 2, "host": "h", "place": "p", "pid": 7,
                                "hint": rank, "description": {}, "join_timeout": 5.0, "barrier_warning": 5.0}, now)
        for peer in "ab":
            core.message(peer, {"type": "bound", "endpoints": {"ipc": "ipc:///x/" + peer}}, now)
        assert not core.over
    for peer, event, pause in events:
        now += pause
        if event == "lost":
            core.lost(peer, now)
        elif event == "garbage":
            assert core.violation(peer, "not JSON", now) == (peer in core.members)
        else:
            message = decoded(json.dumps(event).encode())
            if message is not None:
                core.message(peer, message, now)
        core.tick(now)
        assert len(core.members) <= 2 and len(core._compared) <= 16 and len(core._groups.get("workers", ())) <= 4 * 65536
        if core.over:
            ended = len(sent)
            core.message("a", {"type": "leave"}, now)
            core.tick(now + 100)
            assert len(sent) == ended       # it has said its last word
            break
    judge(sent, events)
    if core.failure is not None:
        assert control.decode([control.encode("failed", **core.failure._asdict())])["type"] == "failed"


def test_names_without_end():
    """A member that makes up comparisons, or claims threads that nobody has, is stopped before it costs memory."""
    sent: list = []
    core = Coordinator(2, lambda peer, kind, fields: sent.append((peer, kind, fields)), pid=1, gather=0)
    join = {"type": "join", "version": control.VERSION, "nodes": 2, "threads": 2, "host": "h", "place": "p", "pid": 7, "description": {},
            "join_timeout": 5.0, "barrier_warning": 5.0, "hint": None}
    core.message("c", {**join, "threads": 2**31 - 1}, 0.0)
    assert sent.pop()[1] == "refused" and not core.members
    for peer in "ab":
        core.message(peer, join, 0.0)
    for number in range(1000):
        core.message("a", {"type": "compare", "name": str(number), "data": {}}, 0.0)
    assert core.over and "comparisons are open" in core.failure.cause and len(core._compared) == 16
