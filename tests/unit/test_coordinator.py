"""lapse.coordinator and lapse.control: decisions of the scheduler, without sockets and without a clock."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import threading

import pytest

from lapse import cluster, control, hosts
from lapse.coordinator import GATHER, GATHER_LAUNCHER, Coordinator, end_text, missing_text


def join(rank=None, **changes) -> dict:
    return {"type": "join", "version": control.VERSION, "nodes": 3, "threads": 2, "host": f"host{rank}", "place": "elsewhere", "pid": 1000,
            "hint": rank, "description": {}, "join_timeout": 10.0, "barrier_warning": 5.0, **changes}


class Bench:
    """A coordinator of three nodes whose peers are the letters a, b, c, and everything that it sent."""

    def __init__(self, **options):
        self.sent: list[tuple] = []
        self.core = Coordinator(3, lambda peer, kind, fields: self.sent.append((peer, kind, fields)), pid=1, **options)

    def up(self) -> Bench:
        for rank, peer in enumerate("abc"):
            self.core.message(peer, join(rank), 0.0)
        for peer in "abc":
            self.core.message(peer, {"type": "bound", "endpoints": {"ipc": "ipc:///x/" + peer}}, 0.0)
        self.sent.clear()
        return self

    def say(self, peer: str, kind: str, now: float = 0.0, **fields) -> None:
        self.core.message(peer, {"type": kind, **fields}, now)

    def fail(self, peer: str, now: float, cause: str = "x", rank=None, how: str = "said") -> None:
        self.say(peer, "fail", now, rank=rank, how=how, cause=cause)

    def kinds(self) -> list[tuple[str, str]]:
        return [(peer, kind) for peer, kind, _ in self.sent]


def test_all_messages_that_are_sent_are_legal():
    """What the coordinator emits passes the receiver's checks."""
    bench = Bench()
    for rank, peer in enumerate("abc"):
        bench.core.message(peer, join(rank), 0.0)
    for peer in "abc":
        bench.say(peer, "bound", endpoints={"tcp": "tcp://127.0.0.1:80"})
    bench.say("a", "arrive", group="workers", member="0/0")
    bench.core.tick(100.0)
    for rank, peer in enumerate("abc"):
        bench.say(peer, "arrive", group="nodes", member=str(rank))
        bench.say(peer, "compare", name="x", data={"a": rank})
    bench.say("a", "leave")
    bench.core.message("d", join(), 0.0)
    bench.fail("b", 1.0)
    bench.core.tick(10.0)
    assert {kind for _, kind, _ in bench.sent} == {"welcome", "table", "missing", "release", "compared", "bye", "refused", "failed"}
    for _, kind, fields in bench.sent:
        assert control.decode([control.encode(kind, **fields)])["type"] == kind


def test_ranks_follow_the_hints_and_then_the_order_of_joining():
    bench = Bench()
    for peer, hint in (("a", 2), ("b", None), ("c", 0)):
        bench.core.message(peer, join(hint), 0.0)
    assert {peer: fields["rank"] for peer, _, fields in bench.sent} == {"a": 2, "b": 1, "c": 0}


def test_a_release_names_those_who_had_arrived():
    """A retired worker that comes back just after a release is not released by it, and may arrive."""
    bench = Bench().up()
    bench.say("a", "retire", member="0/1")
    for peer, member in (("a", "0/0"), ("b", "1/0"), ("b", "1/1"), ("c", "2/0"), ("c", "2/1")):
        bench.say(peer, "arrive", group="workers", member=member)
    bench.say("a", "enlist", member="0/1")
    bench.say("a", "arrive", group="workers", member="0/1")
    assert [(peer, fields["members"]) for peer, kind, fields in bench.sent if kind == "release"] == [
        ("a", ["0/0"]), ("b", ["1/0", "1/1"]), ("c", ["2/0", "2/1"])]


def test_a_release_reaches_only_its_members():
    """The same at the node: the ticket of one who waits for the next barrier stays."""
    node = object.__new__(cluster.Cluster)
    node._cond, node._tickets = threading.Condition(), {("workers", name): cluster._Ticket() for name in ("0/0", "0/1")}
    node._handle({"type": "release", "group": "workers", "members": ["0/0", "0/7"]})
    assert {name: ticket.released for (_, name), ticket in node._tickets.items()} == {"0/0": True, "0/1": False}


def verdict_of(reports, **options):
    """The failure after these calls of (method, arguments)."""
    bench = Bench(**options).up()
    for method, *arguments in reports:
        getattr(bench if method in ("fail", "say") else bench.core, method)(*arguments)
    bench.core.tick(100.0)
    assert sorted(bench.kinds()) == [(peer, "failed") for peer in "abc"]
    assert all(fields == bench.core.failure._asdict() for _, _, fields in bench.sent)
    return bench.core.failure


LOST_C = ("fail", "a", 1.0, "lost it", 2, "lost")
SOMEBODY = ("fail", "a", 1.0, "lost somebody", None, "lost")


@pytest.mark.parametrize(("reports", "rank", "cause"), [
    ([LOST_C], 2, "lost it"),
    ([SOMEBODY, ("lost", "b", 1.1)], 1, "its connection broke"),
    ([LOST_C, ("fail", "b", 1.1, "I broke")], 1, "I broke"),
    ([LOST_C, ("fail", "b", 1.1, "it lies", 0)], 0, "it lies"),
    ([("fail", "a", 1.0, "it lies", 2), ("ended", 1, 3, 7, 1.1)], 1, "ended with exit code 3"),
    ([("fail", "b", 1.0, "interrupted"), ("ended", 1, 1, 7, 1.1)], 1, "interrupted"),
    ([("fail", "b", 1.0, "I broke"), ("ended", 2, -9, 7, 1.1)], 2, "killed by signal 9 (SIGKILL)"),
    ([("fail", "b", 1.0, "first"), ("fail", "c", 1.1, "second")], 1, "first"),
    ([("ended", 0, 0, 7, 1.0)], 0, "ended with exit code 0 without shutting down its server"),
    ([("accuse", 2, "ValueError: no", 1.0)], 2, "ValueError: no"),
    ([("accuse", None, "the launcher gave up", 1.0)], None, "the launcher gave up"),
])
def test_the_best_report_is_the_root_cause(reports, rank, cause):
    failure = verdict_of(reports)
    assert failure.rank == rank
    assert cause in failure.cause


def test_the_first_report_opens_a_window_for_better_ones():
    for launched, grade_wait in ((False, GATHER), (True, GATHER_LAUNCHER)):
        bench = Bench(launched=launched).up()
        bench.core.lost("c", 1.0)
        assert bench.core.tick(1.0) == pytest.approx(1.0 + grade_wait)
        assert not bench.sent
        bench.core.tick(1.0 + grade_wait)
        assert bench.core.over


def test_a_stopped_process_has_no_exit_code_to_wait_for():
    process = subprocess.Popen(["sleep", "60"])
    try:
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        bench = Bench(launched=True)
        for rank, peer in enumerate("abc"):
            bench.core.message(peer, join(rank, place=hosts.place(), pid=process.pid if peer == "c" else os.getpid()), 0.0)
        bench.core.lost("c", 1.0)
        assert bench.core.tick(1.0) == pytest.approx(1.0 + GATHER)
        bench.core.tick(1.0 + GATHER)
        assert (bench.core.failure.rank, bench.core.failure.cause) == (2, hosts.STOPPED)
    finally:
        process.kill()
        process.wait()


def test_a_signal_needs_no_window():
    bench = Bench(launched=True).up()
    bench.core.ended(1, -signal.SIGSEGV, 7, 1.0)
    assert bench.core.over
    assert "SIGSEGV" in bench.core.failure.cause


def test_a_node_that_left_cannot_fail():
    bench = Bench().up()
    bench.say("a", "leave")
    for event in (lambda: bench.core.lost("a", 1.0), lambda: bench.core.ended(0, 1, 7, 1.0), lambda: bench.fail("a", 1.0),
                  lambda: bench.fail("b", 1.0, "gone", 0, "lost"), lambda: bench.core.violation("a", "x", 1.0)):
        event()
        assert bench.core.tick(100.0) is None
        assert bench.core.failure is None
    bench.say("b", "leave")
    bench.say("c", "leave")
    assert bench.core.over
    assert bench.core.failure is None


def test_strangers_change_nothing():
    bench = Bench().up()
    for kind, fields in (("leave", {}), ("arrive", {"group": "nodes", "member": "0"}), ("fail", {"rank": 0, "how": "said", "cause": "x"})):
        bench.say("stranger", kind, **fields)
    assert not bench.core.violation("stranger", "garbage", 0.0)
    assert not bench.sent
    assert bench.core.tick(100.0) is None


@pytest.mark.parametrize("message", [
    {"type": "bound", "endpoints": {"ipc": "ipc:///x/y"}}, join(0), {"type": "welcome", "rank": 0, "job": 1, "pid": 1, "members": []},
    {"type": "retire", "member": "1/0"}, {"type": "enlist", "member": "0/9"}, {"type": "arrive", "group": "workers", "member": "1/1"},
])
def test_a_member_that_breaks_the_rules_ends_the_job(message):
    bench = Bench().up()
    bench.core.message("a", message, 0.0)
    bench.core.tick(100.0)
    assert bench.core.failure.rank == 0


def test_the_warning_about_a_barrier_comes_again_ever_later():
    bench = Bench().up()
    bench.say("a", "arrive", 1.0, group="nodes", member="0")
    times, now = [], 1.0
    while len(times) < 3:
        now = bench.core.tick(now)
        times.append(now)
    assert times == [6.0, 16.0, 36.0]
    missing = [fields["members"] for peer, kind, fields in bench.sent if peer == "b"]
    assert missing[0] == ["1", "2"]


def test_texts():
    assert "and 5 more" in missing_text("nodes", [str(i) for i in range(25)], 3.0)
    assert end_text(-9) == "killed by signal 9 (SIGKILL)"
    assert end_text(4) == "ended with exit code 4"


# -- control: every received byte is hostile

GOOD = join(1)


@pytest.mark.parametrize("frames", [
    [], [b""], [b"x"], [b"[]"], [b"null"], [b"{}"], [b'{"type": 3}'], [b'{"type": ["leave"]}'], [b'{"type": "unknown"}'],
    [b'{"type": "leave"}', b""], [b'{"type": "leave", "more": 1}'], [b"[" * 100_000], [b'"\xff"'], [b" " * (control.MAX_BYTES + 1)],
    [b'{"type": "arrive", "group": "nodes", "member": "' + b"x" * 5000 + b'"}'],
])
def test_frames_that_are_no_message(frames):
    with pytest.raises(control.Malformed):
        control.decode(frames)


@pytest.mark.parametrize(("field", "value"), [
    ("version", "1"), ("version", True), ("version", -1), ("version", 2**64), ("nodes", 1.5), ("threads", None), ("host", 7),
    ("pid", [1]), ("hint", "0"), ("description", []), ("join_timeout", 0), ("join_timeout", float("nan")), ("join_timeout", float("inf")),
    ("barrier_warning", "1"), ("place", None),
])
def test_every_field_is_checked(field, value):
    assert control.decode([json.dumps(GOOD).encode()]) == GOOD
    with pytest.raises(control.Malformed):
        control.decode([json.dumps({**GOOD, field: value}).encode()])
    with pytest.raises(control.Malformed):
        control.decode([json.dumps({k: v for k, v in GOOD.items() if k != field}).encode()])


@pytest.mark.parametrize("endpoints", [
    {}, {"ipc": "ipc://relative"}, {"ipc": "tcp://127.0.0.1:1"}, {"tcp": "tcp://*:1"}, {"tcp": "tcp://name:1"}, {"udp": "udp://x"},
    {"ipc": "ipc:///" + "x" * 120}, {"tcp": "tcp://127.0.0.1"}, {"ipc": "ipc:///a\nb"}, {"ipc": None},
])
def test_endpoints_are_checked(endpoints):
    with pytest.raises(control.Malformed):
        control.decode([control.encode("bound", endpoints=endpoints)])


def test_legal_endpoints():
    for endpoints in ({"ipc": "ipc:///tmp/x"}, {"tcp": "tcp://10.0.0.1:4000"}, {"tcp": "tcp://[fe80::1%eth0]:4000"}):
        assert control.decode([control.encode("bound", endpoints=endpoints)])["endpoints"] == endpoints


def test_long_texts_are_cut():
    message = control.decode([control.encode("fail", rank=None, how="said", cause="x" * 100_000)])
    assert len(message["cause"]) == control.MAX_NAME
