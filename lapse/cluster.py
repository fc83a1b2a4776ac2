"""One node's membership in a job: rendezvous, data sockets, barriers, liveness.

Locking: `_cond` guards everything that callers and the control thread (link.py) share. Nothing here needs the GIL to be quick:
that a node is alive is told by the ZMTP heartbeats of libzmq's I/O threads.

A job of one node (role local) has no scheduler, no port and no thread: its Coordinator is called directly, under `_cond`.
"""
from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import NamedTuple

import zmq

from lapse import control, hosts, ipc, sockets
from lapse.config import Config
from lapse.control import Failure
from lapse.coordinator import Coordinator, missing_text
from lapse.errors import LapseError, NodeFailure
from lapse.link import Link
from lapse.scheduler import Scheduler, warn_unauthenticated

__all__ = ["Cluster", "Failure", "Member", "Scheduler"]

log = logging.getLogger("lapse.cluster")

FRAME_BYTES = (16 << 20) + 4096     # of a data message, unless the caller knows better
GRACE = 5.0                         # seconds a joined node waits, beyond the timeout, for the scheduler to name who is missing


_live: weakref.WeakSet[Cluster] = weakref.WeakSet()


def any_alive() -> bool:
    """Whether this process is a node of a job now."""
    return any(cluster._pid == os.getpid() and not cluster._closed for cluster in list(_live))


class Member(NamedTuple):
    rank: int
    host: str
    pid: int


class _Ticket:
    """An arrival at a barrier that has not been released yet (or whose release nobody has waited for)."""

    __slots__ = ("released", "waiting")

    def __init__(self):
        self.released = False
        self.waiting = False


class Cluster:
    """Join the job and block until every node is up.

    `description` is what all nodes must agree on; when two differ, all are refused and told in which entry. `on_failure` is
    called once, with the root cause that all nodes get; from the control thread, in a job of one node from the thread
    that called `fail`. `max_message`: the largest frame that the data sockets accept.

    Raises LapseError when the scheduler cannot be reached within join_timeout (naming host and port), when a node is
    missing (naming it) or refused, and NodeFailure when a node dies meanwhile.
    """

    def __init__(self, config: Config, description: dict, on_failure: Callable[[Failure], None], *,
                 max_message: int = FRAME_BYTES):
        self.config = config
        self.rank = 0
        self.num_nodes = config.num_nodes
        self.job_id = 0
        self.members: list[Member] = []
        self.failure: Failure | None = None
        self.push: list[zmq.Socket] = []
        self._pid = os.getpid()
        self._on_failure = on_failure
        self._max_message = max_message
        self._cond = threading.Condition()
        self._tickets: dict[tuple[str, str], _Ticket] = {}
        self._compared: dict[str, dict[int, dict]] = {}
        self._up = False                    # the constructor may return
        self._refused: str | None = None    # ... or raise this
        self._over = False                  # a verdict has come, or the end
        self._goodbyes = False
        self._left = False
        self._closed = False
        self._thread: threading.Thread | None = None
        self._solo: Coordinator | None = None
        self._link: Link | None = None
        self.context = zmq.Context(io_threads=config.zmq_threads)
        _live.add(self)
        try:
            if config.role == "local":
                self._start_alone(description)
            else:
                self._join(description)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                self.fail("interrupted")
            self._over = True
            self.close()
            raise

    @property
    def authenticated(self) -> bool:
        """Whether a data message's User-Id is the rank of its sender."""
        return self.config.role != "local" and self.config.authenticated

    @property
    def refused(self) -> int:
        """How many connections of strangers this node has not admitted."""
        return self._link.refused if self._link is not None else 0

    # -- starting

    def _start_alone(self, description: dict) -> None:
        self.pull = sockets.make(self.context, zmq.PULL, self.config, max_bytes=self._max_message)
        self._connect_self()
        self._solo = Coordinator(1, self._solo_deliver, pid=self._pid, gather=0)
        self._solo.message(0, _join_message(self.config, description), time.monotonic())

    def _connect_self(self) -> None:
        self.pull.bind("inproc://pull")
        own = sockets.make(self.context, zmq.PUSH, self.config, max_bytes=self._max_message)
        own.connect("inproc://pull")
        self.push = [own]

    def _solo_deliver(self, peer, kind: str, fields: dict) -> None:
        self._handle({"type": kind, **fields})

    def _join(self, description: dict) -> None:
        config = self.config
        address = hosts.resolve(config.root_host)
        sockets.check_beyond_loopback(f"the scheduler is at {config.root_host} ({address})", address, config)
        if config.ipc_dir is not None:
            ipc.check(config.ipc_dir)
        if not config.authenticated:
            warn_unauthenticated(address)
        self._link = Link(self, address, _join_message(config, {"transport": config.transport, **description}))
        self._thread = threading.Thread(target=self._link.run, name="lapse-control", daemon=True)
        self._thread.start()
        self._await_up(f"{config.root_host}:{config.root_port}")

    def _await_up(self, where: str) -> None:
        deadline = time.monotonic() + self.config.join_timeout
        with self._cond:
            while not (self._up or self._over or self._refused):
                left = deadline + (GRACE if self._link.joined else 0.0) - time.monotonic()
                if left <= 0:
                    break
                self._cond.wait(min(1.0, left))
            if self._up:
                return
            if self.failure is not None:
                raise NodeFailure(*self.failure)
            if self._refused is not None:
                raise LapseError(self._refused)
            waited = f"within {self.config.join_timeout:g} s"
            if self._link.joined:
                raise LapseError(f"the nodes of the job (scheduler at {where}) did not all come up {waited}")
            why = f" ({self._link.obstacle})" if self._link.obstacle else ""
            raise LapseError(f"cannot reach the scheduler at {where} {waited}{why}")

    # -- what a node does

    def ready(self) -> None:
        """Say that all channels of this node stand, and wait until every node has said so. Blocking; one thread; collective."""
        self._meet("ready", str(self.rank), None)

    def barrier(self, group: str, member: str, timeout: float | None = None) -> None:
        """Wait until every member of the group has arrived.

        "workers" are "rank/worker" for every worker slot of every node, "nodes" are the ranks. After a TimeoutError (or
        Ctrl-C) the arrival stands, and the next call of this member goes on waiting for the same barrier. Raises
        NodeFailure when the job fails. Blocking; thread-safe; collective.
        """
        self._meet(group, member, timeout)

    def _meet(self, group: str, member: str, timeout: float | None) -> None:
        self._check_process()
        deadline = None if timeout is None else time.monotonic() + timeout
        key = (group, member)
        with self._cond:
            self._check_alive()
            ticket = self._tickets.get(key)
            if ticket is None:
                ticket = self._tickets[key] = _Ticket()
                self._tell("arrive", group=group, member=member)
            elif ticket.waiting:
                self._tell("arrive", group=group, member=member)  # a second time: the scheduler ends the job for it
            ticket.waiting = True
            try:
                self._wait(lambda: ticket.released, deadline, f"barrier of the {group}")
            finally:
                ticket.waiting = False
            self._tickets.pop(key, None)

    def retire(self, member: str) -> None:
        """Count this worker as arrived at every later barrier of the workers. Never blocks; thread-safe; local."""
        if self._mine():
            with self._cond:
                if not self._over:
                    self._tell("retire", member=member)

    def enlist(self, member: str) -> None:
        """Count a retired worker in again (its slot has a new Worker). Never blocks; thread-safe; local."""
        self._check_process()
        with self._cond:
            if not self._over:
                self._tell("enlist", member=member)

    def compare(self, name: str, data: dict) -> dict[int, dict]:
        """Hand `data` (JSON) to all nodes and return everybody's, by rank. Blocking; one thread per name; collective."""
        self._check_process()
        with self._cond:
            self._check_alive()
            self._tell("compare", name=name, data=data)
            self._wait(lambda: name in self._compared, None, f"comparison {name!r}")
            return self._compared.pop(name)

    def expect_goodbyes(self) -> None:
        """From now on a broken data connection is the normal end of a peer. Never blocks; thread-safe; local."""
        self._goodbyes = True

    def fail(self, cause: str, rank: int | None = None) -> None:
        """Report that the job cannot go on, because of this node or of `rank`. Never blocks; thread-safe.

        The scheduler weighs all reports and tells every node the root cause; `on_failure` is called then.
        """
        if not self._mine():
            return
        callback = None
        with self._cond:
            if not self._over:
                self._tell("fail", rank=rank, how="said", cause=cause)
                if self._solo is not None:
                    callback = self.failure
        if callback is not None:
            self._on_failure(callback)

    def heard(self, rank: int, descriptor: int) -> None:
        """Say from which connection (the message property "__fd") HELLO of `rank` came, so that its end can be noticed on
        this side too: a sender with a backlog does not see a frozen receiver. Never blocks; thread-safe; local.
        """
        if self._mine() and self._link is not None:
            self._link.command(("heard", rank, descriptor))

    def leave(self) -> None:
        """End the membership normally: tell the scheduler, join the control thread. Blocking; one thread; local."""
        self._check_process()
        with self._cond:
            if self._left or self._over:
                return
            self._goodbyes = True
            self._tell("leave")
            self._wait(lambda: self._left, time.monotonic() + GRACE, "end of the job")
        self._stop_thread()

    def close(self) -> None:
        """Close all sockets and the context; the server thread has been joined. Idempotent; does nothing in a forked child."""
        if not self._mine() or self._closed:
            return
        self._closed = True
        normal = self.failure is None and (self._left or self._solo is not None)
        with self._cond:
            self._over = True
            self._cond.notify_all()
        self._stop_thread()
        if self._link is not None:
            self._link.close_monitored()
        self.context.destroy(linger=1000 if normal else 0)
        if self._link is not None:
            self._link.clean_up()

    # -- shared by callers and the control thread

    def _mine(self) -> bool:
        return os.getpid() == self._pid

    def _check_process(self) -> None:
        if not self._mine():
            raise RuntimeError("this Lapse object belongs to the parent process; a forked child cannot use it")

    def _check_alive(self) -> None:
        if self.failure is not None:
            raise NodeFailure(*self.failure)
        if self._over or self._left:
            raise RuntimeError("the node has left its job")

    def _wait(self, done: Callable[[], bool], deadline: float | None, what: str) -> None:
        """Wait under _cond; Ctrl-C gets through."""
        while not done():
            self._check_alive()
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                raise TimeoutError(f"timeout while waiting for the {what}")
            pause = 1.0 if deadline is None else min(1.0, deadline - now)
            self._cond.wait(pause)
            if self._solo is not None:
                self._solo.tick(time.monotonic())

    def _tell(self, kind: str, **fields) -> None:
        if self._solo is not None:
            self._solo.message(0, {"type": kind, **fields}, time.monotonic())
        else:
            self._link.command(("send", kind, fields))

    def _handle(self, message: dict) -> None:
        """A message of the scheduler that is not about starting."""
        kind = message["type"]
        with self._cond:
            if kind == "release":
                for member in message["members"]:
                    ticket = self._tickets.get((message["group"], member))
                    if ticket is not None:
                        ticket.released = True
            elif kind == "compared":
                self._compared[message["name"]] = dict(enumerate(message["data"]))
            elif kind == "bye":
                self._left = True
            elif kind == "missing":
                if self._solo is None:  # there the Coordinator has said it in this process
                    log.warning("%s", missing_text(message["group"], message["members"], message["seconds"]))
            elif kind == "refused":
                self._refused = message["reason"]
                self._over = True
            elif kind == "failed":
                self._end(Failure(*(message[name] for name in Failure._fields)))
            elif kind == "welcome":
                self._welcome(message)
                self._up = self._solo is not None
            self._cond.notify_all()

    def _welcome(self, message: dict) -> None:
        self.rank = message["rank"]
        self.job_id = message["job"]
        self.members = [Member(m["rank"], m["host"], m["pid"]) for m in message["members"]]

    def _end(self, failure: Failure) -> None:
        """The verdict (under _cond). Later ones are ignored."""
        if not self._over and self.failure is None:
            self.failure = failure
            self._over = True

    def _stop_thread(self) -> None:
        if self._link is not None and self._thread is not None:
            self._link.command(("stop",))
            if self._thread is not threading.current_thread():
                self._thread.join()


def _join_message(config: Config, description: dict) -> dict:
    return {"type": "join", "version": control.VERSION, "nodes": config.num_nodes, "threads": config.num_threads,
            "host": hosts.host_name(), "place": hosts.place(), "pid": os.getpid(), "hint": config.rank_hint,
            "description": description, "join_timeout": config.join_timeout, "barrier_warning": config.barrier_warning}
