"""What the scheduler knows and decides, without sockets, threads or clocks: events in, messages out.

The scheduler feeds it with what arrives over ZeroMQ; a job of one node (no DMLC_*) uses it in its own process. One caller at
a time. `peer` is whatever the caller uses to address a node; time is handed in.

The life of a job: nodes join -> all are here: ranks, `welcome` -> `bound` from all -> `table` -> barriers -> `leave` from all;
or, at any instant, a failure. The first report of a failure opens a short window for better ones (the launcher, which sees exit
codes, is the best witness); then the root cause is broadcast, once, and the job is over.
"""
from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from lapse import hosts
from lapse.control import MAX_THREADS, VERSION, Failure

log = logging.getLogger("lapse.cluster")

MAX_COMPARED = 16       # comparisons that have begun and not ended
GATHER = 0.3            # seconds between the first report of a failure and the verdict
GATHER_LAUNCHER = 1.0   # ... when a launcher will know how the process ended

# How good a report is; the best one is the root cause, among equals the earliest.
KILLED, SAID, EXITED, ACCUSED, LOST, SOMEBODY = range(6)
LOST_TEXT = "its connection broke, or it does not answer heartbeats"


@dataclass
class Member:
    peer: Hashable
    join: dict                      # the message
    rank: int | None = None
    endpoints: dict | None = None
    deadline: float = 0.0
    left: bool = False
    lost: bool = False

    @property
    def label(self) -> str:
        where = f"{self.join['host']}, pid {self.join['pid']}"
        return f"a node ({where})" if self.rank is None else f"node {self.rank} ({where})"


@dataclass
class Barrier:
    arrived: set[str] = field(default_factory=set)
    since: float = 0.0
    warn_at: float = 0.0
    pause: float = 0.0


class Coordinator:
    def __init__(self, num_nodes: int, send: Callable[[Hashable, str, dict], None], *, pid: int, gather: float = GATHER,
                 launched: bool = False, keys: Sequence[str] = ()):
        self.num_nodes = num_nodes
        self.job_id = secrets.randbits(63) + 1
        self.members: dict[Hashable, Member] = {}
        self.by_rank: list[Member] = []         # filled when all are here
        self.over = False                       # nothing more will be sent
        self.failure: Failure | None = None
        self._send = send
        self._pid = pid
        self._gather = gather
        self._keys = keys                       # the nodes' public keys, by rank; empty without
        self._launched = launched               # a launcher will tell how processes ended
        self._ended: dict[int, tuple[str, int, str]] = {}   # rank -> how its process ended, as the launcher says, pid and host
        self._barriers: dict[str, Barrier] = {}
        self._groups: dict[str, frozenset[str]] = {}
        self._retired: set[str] = set()
        self._compared: dict[str, dict[int, dict]] = {}
        self._reports: list[tuple[int, int, Failure]] = []
        self._verdict_at: float | None = None

    # -- events

    def message(self, peer: Hashable, message: dict, now: float) -> None:
        """A checked message (control.decode) from a peer."""
        kind = message["type"]
        member = self.members.get(peer)
        if self.over:
            return
        if kind == "join":
            if member is None:
                self._join(peer, message, now)
            else:
                self._blame(member, ACCUSED, "joined twice", "the scheduler", now)
        elif member is None:
            log.warning("a stranger sent %r to the scheduler; ignored", kind)
        elif member.left:
            pass
        elif kind == "fail":
            self._fail(member, message, now)
        elif member.rank is None or kind not in _HANDLERS:
            self.violation(peer, f"sent {kind!r} out of turn", now)
        else:
            _HANDLERS[kind](self, member, message, now)

    def violation(self, peer: Hashable, what: str, now: float) -> bool:
        """A peer sent what no member would send. False when it is a stranger."""
        member = self.members.get(peer)
        if member is None:
            return False
        if not self.over and not member.left:
            self._blame(member, ACCUSED, f"protocol error on the control connection: {what}", "the scheduler", now)
        return True

    def lost(self, peer: Hashable, now: float) -> None:
        """The control connection of a peer broke."""
        member = self.members.get(peer)
        if member is None or member.lost:
            return
        member.lost = True
        if self.over or member.left:
            return
        self._blame(member, LOST, LOST_TEXT, "the scheduler", now)

    def ended(self, rank: int, status: int, pid: int, now: float, host: str = "") -> None:
        """The launcher's word: the process of this rank (on `host`; "": here) ended with this exit code, or, below 0, by this signal."""
        member = self._ranked(rank)
        if self.over or (member is not None and member.left):
            return
        cause = end_text(status) + ("" if status or not member else " without shutting down its server")
        self._ended[rank] = cause, pid, host or hosts.host_name()
        if member is not None:
            self._blame(member, KILLED if status < 0 else EXITED, cause, "the launcher", now)
        elif self.members:
            self._missing_ended(rank, now)

    def stop(self, cause: str, now: float) -> None:
        """The launcher ends the job (Ctrl-C, SIGTERM, an exception of a worker elsewhere)."""
        self.accuse(None, cause, now)

    def accuse(self, rank: int | None, cause: str, now: float, host: str = "") -> None:
        """The launcher knows what went wrong, on this rank (on `host`, if it has not joined) or (None) outside of all nodes."""
        if not self.over:
            member = None if rank is None else self._ranked(rank)
            who = (rank, member.join["host"], member.join["pid"]) if member else (rank, host, 0)
            self._report(SAID, Failure(*who, cause, "the launcher"), now)
            self._verdict()

    def tick(self, now: float) -> float | None:
        """Do what is due; the time of the next thing, None if there is none."""
        if self.over:
            return None
        due: list[float] = []
        if self._verdict_at is not None:
            if now >= self._verdict_at:
                self._verdict()
                return None
            due.append(self._verdict_at)
        if not self.by_rank and self.members:
            deadline = min(member.deadline for member in self.members.values())
            if now >= deadline:
                self._refuse_all(self._missing_text())
                return None
            due.append(deadline)
        for group, barrier in self._barriers.items():
            if barrier.arrived:
                if now >= barrier.warn_at:
                    self._warn(group, barrier, now)
                due.append(barrier.warn_at)
        return min(due, default=None)

    # -- joining

    def _join(self, peer: Hashable, message: dict, now: float) -> None:
        hint = message["hint"]
        reason = None
        if message["version"] != VERSION:
            reason = f"the control protocol of this node has version {message['version']}, the scheduler's {VERSION}"
        elif message["nodes"] != self.num_nodes:
            reason = f"this node expects {message['nodes']} nodes, the scheduler {self.num_nodes}"
        elif len(self.members) >= self.num_nodes:
            reason = f"the job has its {self.num_nodes} nodes already"
        elif hint is not None and (hint >= self.num_nodes or any(m.join["hint"] == hint for m in self.members.values())):
            reason = f"rank {hint} is taken" if hint < self.num_nodes else f"there is no rank {hint}"
        elif not 1 <= message["threads"] <= MAX_THREADS:
            reason = f"a node needs worker threads, at most {MAX_THREADS}"
        if reason:
            log.warning("refused a node (%s, pid %d): %s", message["host"], message["pid"], reason)
            self._send(peer, "refused", {"reason": reason})
            return
        self.members[peer] = Member(peer, message, deadline=now + message["join_timeout"])
        if self._ended:
            self._missing_ended(min(self._ended), now)
        elif len(self.members) == self.num_nodes:
            self._welcome()

    def _welcome(self) -> None:
        ranks: list[Member | None] = [None] * self.num_nodes
        for member in self.members.values():
            if member.join["hint"] is not None:
                ranks[member.join["hint"]] = member
        rest = iter([member for member in self.members.values() if member.join["hint"] is None])
        self.by_rank = [member or next(rest) for member in ranks]
        for rank, member in enumerate(self.by_rank):
            member.rank = rank
        difference = self._difference()
        if difference:
            self._refuse_all(difference)
            return
        self._groups["nodes"] = self._groups["ready"] = frozenset(str(rank) for rank in range(self.num_nodes))
        self._groups["workers"] = frozenset(
            f"{member.rank}/{worker}" for member in self.by_rank for worker in range(member.join["threads"]))
        table = [{"rank": m.rank, "host": m.join["host"], "place": m.join["place"], "pid": m.join["pid"],
                  "key": self._keys[m.rank] if self._keys else ""} for m in self.by_rank]
        for member in self.by_rank:
            self._send(member.peer, "welcome",
                       {"rank": member.rank, "job": self.job_id, "pid": self._pid, "members": table})

    def _difference(self) -> str | None:
        """In which entry of their descriptions two nodes differ."""
        first = self.by_rank[0]
        theirs = first.join["description"]
        for member in self.by_rank[1:]:
            description = member.join["description"]
            for name in sorted(theirs.keys() | description.keys()):
                a, b = theirs.get(name, "(nothing)"), description.get(name, "(nothing)")
                if a != b:
                    return f"the nodes differ in {name}: {_short(a)} on {first.label}, {_short(b)} on {member.label}"
        return None

    def _missing_text(self) -> str:
        known = {m.join["hint"] for m in self.members.values()} - {None}
        here = ", ".join(m.label for m in self.members.values())
        if len(known) == len(self.members):
            absent = [str(rank) for rank in range(self.num_nodes) if rank not in known]
            who = f"node{'s' if len(absent) > 1 else ''} {', '.join(absent)}"
        else:
            who = f"{self.num_nodes - len(self.members)} of the {self.num_nodes} nodes"
        return f"{who} did not join the job in time; here: {here}"

    def _missing_ended(self, rank: int, now: float) -> None:
        """A process is gone that never joined: the others need not wait for it."""
        how, pid, host = self._ended[rank]
        self._report(EXITED, Failure(rank, host, pid, f"{how} before it joined the job", "the launcher"), now)

    def _refuse_all(self, reason: str) -> None:
        log.error("%s", reason)
        for member in self.members.values():
            if not member.lost:
                self._send(member.peer, "refused", {"reason": reason})
        self.failure = Failure(None, "", 0, reason, "the scheduler")
        self.over = True

    def _bound(self, member: Member, message: dict, now: float) -> None:
        if member.endpoints is not None:
            self.violation(member.peer, "sent 'bound' twice", now)
            return
        member.endpoints = message["endpoints"]
        if all(m.endpoints is not None for m in self.by_rank):
            table = [m.endpoints for m in self.by_rank]
            for m in self.by_rank:
                self._send(m.peer, "table", {"endpoints": table})

    # -- barriers and other meetings

    def _arrive(self, member: Member, message: dict, now: float) -> None:
        group, name = message["group"], message["member"]
        if name not in self._groups.get(group, ()) or name.partition("/")[0] != str(member.rank):
            self.violation(member.peer, f"arrived as {name!r} at the barrier of {group!r}", now)
            return
        barrier = self._barriers.setdefault(group, Barrier())
        if name in barrier.arrived:
            self.violation(member.peer, f"{name} arrived twice at one barrier of the {group}", now)
            return
        if not barrier.arrived:
            barrier.since = now
            barrier.pause = min(m.join["barrier_warning"] for m in self.by_rank)
            barrier.warn_at = now + barrier.pause
        if group == "workers":
            self._retired.discard(name)
        barrier.arrived.add(name)
        self._release(group)

    def _retire(self, member: Member, message: dict, now: float) -> None:
        name = message["member"]
        if name not in self._groups["workers"] or name.partition("/")[0] != str(member.rank):
            self.violation(member.peer, f"retired {name!r}", now)
        elif message["type"] == "enlist":
            self._retired.discard(name)
        else:
            self._retired.add(name)
            self._release("workers")

    def _absent(self, group: str, barrier: Barrier) -> set[str]:
        absent = self._groups[group] - barrier.arrived
        return absent - self._retired if group == "workers" else absent

    def _release(self, group: str) -> None:
        barrier = self._barriers.get(group)
        if barrier is None or not barrier.arrived or self._absent(group, barrier):
            return
        # Each node is told whom of its members it releases: one that was not waited for may arrive at the next barrier before that.
        released: dict[str, list[str]] = {}
        for name in sorted(barrier.arrived):
            released.setdefault(name.partition("/")[0], []).append(name)
        barrier.arrived.clear()
        for member in self.by_rank:
            names = released.get(str(member.rank))
            if names and not (member.left or member.lost):
                self._send(member.peer, "release", {"group": group, "members": names})

    def _warn(self, group: str, barrier: Barrier, now: float) -> None:
        def order(name: str):
            return [int(part) for part in name.split("/")]

        absent = sorted(self._absent(group, barrier), key=order)
        seconds = now - barrier.since
        log.warning("%s", missing_text(group, absent, seconds))
        self._tell_all("missing", {"group": group, "members": absent[:100], "seconds": max(seconds, 1e-3)})
        barrier.pause *= 2
        barrier.warn_at = now + barrier.pause

    def _compare(self, member: Member, message: dict, now: float) -> None:
        if message["name"] not in self._compared and len(self._compared) >= MAX_COMPARED:
            self.violation(member.peer, f"sent data for {message['name']!r} while {MAX_COMPARED} other comparisons are open", now)
            return
        data = self._compared.setdefault(message["name"], {})
        if member.rank in data:
            self.violation(member.peer, f"sent its data for {message['name']!r} twice", now)
            return
        data[member.rank] = message["data"]
        if len(data) == self.num_nodes:
            del self._compared[message["name"]]
            self._tell_all("compared", {"name": message["name"], "data": [data[r] for r in range(self.num_nodes)]})

    def _leave(self, member: Member, message: dict, now: float) -> None:
        member.left = True
        self._send(member.peer, "bye", {})
        if all(m.left for m in self.by_rank):
            self.over = True

    def _tell_all(self, kind: str, fields: dict) -> None:
        for member in self.by_rank:
            if not (member.left or member.lost):
                self._send(member.peer, kind, fields)

    # -- failure

    def _fail(self, reporter: Member, message: dict, now: float) -> None:
        """A node reports: about itself, about another, or that some connection broke."""
        rank, noticed_by = message["rank"], reporter.label
        if rank is not None and rank >= len(self.by_rank):
            rank = None
        if rank is None and message["how"] == "lost":
            self._report(SOMEBODY, Failure(None, "", 0, message["cause"], noticed_by), now)
            return
        accused = reporter if rank is None else self.by_rank[rank]
        if message["how"] == "lost":
            if accused.left:
                return
            grade = LOST
        else:
            grade = SAID if accused is reporter else ACCUSED
        self._blame(accused, grade, message["cause"], noticed_by if accused is not reporter else "itself", now)

    def _blame(self, member: Member, grade: int, cause: str, noticed_by: str, now: float) -> None:
        rank = member.join["hint"] if member.rank is None else member.rank
        self._report(grade, Failure(rank, member.join["host"], member.join["pid"], cause, noticed_by), now)

    def _report(self, grade: int, failure: Failure, now: float) -> None:
        self._reports.append((grade, len(self._reports), failure))
        if self._verdict_at is None:
            # A process that is stopped has no exit code that a launcher could tell.
            waits_for_launcher = self._launched and grade >= ACCUSED and not (grade == LOST and self._fate(failure.pid) == hosts.STOPPED)
            self._verdict_at = now + (max(self._gather, GATHER_LAUNCHER) if waits_for_launcher else self._gather)
        if grade == KILLED or self._gather == 0:
            self._verdict()

    def _verdict(self) -> None:
        if self.over:
            return
        grade, _, failure = min(self._reports)
        if grade == LOST:
            failure = failure._replace(cause=self._fate(failure.pid) or failure.cause)
        self.failure = failure
        self.over = True
        for member in self.members.values():
            if not member.left:
                self._send(member.peer, "failed", self.failure._asdict())

    def _fate(self, pid: int) -> str | None:
        """What became of the process behind a broken connection, when it ran on this machine."""
        here = any(m.join["pid"] == pid and m.join["place"] == hosts.place() for m in self.members.values())
        return hosts.process_state(pid) if here else None

    def _ranked(self, rank: int) -> Member | None:
        if self.by_rank:
            return self.by_rank[rank] if rank < len(self.by_rank) else None
        return next((m for m in self.members.values() if m.join["hint"] == rank), None)


_HANDLERS = {
    "bound": Coordinator._bound,
    "arrive": Coordinator._arrive,
    "retire": Coordinator._retire,
    "enlist": Coordinator._retire,
    "compare": Coordinator._compare,
    "leave": Coordinator._leave,
}


def missing_text(group: str, members: list[str], seconds: float) -> str:
    """The warning about a barrier that waits for somebody."""
    names = ", ".join(members[:20]) + (f" and {len(members) - 20} more" if len(members) > 20 else "")
    what = "workers (node/worker)" if group == "workers" else "nodes"
    return f"a barrier has been waiting for {seconds:.0f} s; missing {what}: {names}"


def end_text(status: int) -> str:
    """How a process ended, from subprocess's return code."""
    if status >= 0:
        return f"ended with exit code {status}"
    import signal

    try:
        return f"killed by signal {-status} ({signal.Signals(-status).name})"
    except ValueError:
        return f"killed by signal {-status}"


def _short(value) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
