"""One node's membership in a job: rendezvous, data sockets, barriers, liveness.

Locking: `_cond` guards everything that callers and the control thread share. The control thread alone uses the DEALER, the
monitors and the gate; other threads put messages into `_outbox` and wake it. `pull` and `push` are made by the control
thread and belong to the caller once the constructor has returned. Nothing here needs the GIL to be quick: that a node is alive
is told by the ZMTP heartbeats of libzmq's I/O threads.

A job of one node (role local) has no scheduler, no port and no thread: its Coordinator is called directly, under `_cond`.
"""
from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import zmq

from lapse import control, hosts, ipc, sockets
from lapse.config import Config
from lapse.control import Failure
from lapse.coordinator import LOST_TEXT, Coordinator, missing_text
from lapse.errors import LapseError, NodeFailure
from lapse.scheduler import Scheduler, warn_unauthenticated

__all__ = ["Cluster", "Failure", "Member", "Scheduler"]

log = logging.getLogger("lapse.cluster")

FRAME_BYTES = (16 << 20) + 4096     # of a data message, unless the caller knows better
GRACE = 5.0                         # seconds a joined node waits, beyond the timeout, for the scheduler to name who is missing
RECONNECT_MS = 50                   # at start, until the scheduler is there
RECONNECT_MAX_MS = 1000


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
        self._link: _Link | None = None
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
        if not hosts.is_loopback(address) and config.security != "none":
            raise LapseError(
                f"the scheduler is at {config.root_host} ({address}), beyond loopback, where connections would be neither encrypted "
                "nor authenticated; LAPSE_SECURITY=none (or setup(..., security='none')) allows it in a network that you trust")
        if config.ipc_dir is not None:
            ipc.check(config.ipc_dir)
        if not config.authenticated:
            warn_unauthenticated(address)
        self._link = _Link(self, address, _join_message(config, {"transport": config.transport, **description}))
        self._thread = threading.Thread(target=self._link.run, name="lapse-control", daemon=True)
        self._thread.start()
        self._await_up(f"{config.root_host}:{config.root_port}")

    def _await_up(self, where: str) -> None:
        deadline = time.monotonic() + self.config.join_timeout
        with self._cond:
            while not (self._up or self._over or self._refused):
                grace = GRACE if self._link.joined else 0.0
                if not self._cond.wait(min(1.0, max(0.0, deadline + grace - time.monotonic()))) \
                        and time.monotonic() >= deadline + grace:
                    break
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
                for (group, _), ticket in self._tickets.items():
                    if group == message["group"]:
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


class _Link:
    """The control thread: the connection with the scheduler, the making of the data sockets, the monitors, the gate."""

    def __init__(self, cluster: Cluster, address: str, join: dict):
        self._cluster = cluster
        self._config = config = cluster.config
        self._address = address
        self._join = join
        self._outbox: deque = deque()
        self._waker = sockets.Waker()
        self.joined = False                     # the handshake is done and `join` is on its way
        self.obstacle = ""                      # why the scheduler could not be reached so far
        self._scheduler_pid = 0
        self._folder: ipc.Folder | None = None  # owned, removed at the end
        self._places: list[str] = []
        self._monitors: dict[int, sockets.Monitor] = {}     # rank -> of push[rank]
        self._pull_monitor: sockets.Monitor | None = None
        self._unconnected: set[int] = set()     # peers whose handshake is still awaited
        self._pull_open: dict[int, int | None] = {}  # connections to the PULL: descriptor -> rank, where known
        self._reported: set = set()
        self._disconnected = False              # from the scheduler, for good
        self._announced = False
        self._stopping = False
        context = cluster.context
        self._gate = sockets.Gate(context, config)
        self._dealer = sockets.make(context, zmq.DEALER, config, max_bytes=control.MAX_BYTES)
        self._dealer.setsockopt(zmq.IPV6, ":" in address)
        self._dealer.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
        self._dealer.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
        sockets.identify(self._dealer, config, sockets.CONTROL_USER)
        self._dealer_monitor = sockets.Monitor(self._dealer)
        self._poller = zmq.Poller()
        for source in (self._waker.fd, self._dealer, self._dealer_monitor.pair, self._gate.sock):
            self._poller.register(source, zmq.POLLIN)
        self._dealer.connect(sockets.endpoint(address, config.root_port))

    def command(self, entry: tuple) -> None:
        """Hand something to the control thread. Any thread; never blocks."""
        self._outbox.append(entry)
        self._waker.wake()

    def run(self) -> None:
        """The control thread."""
        cluster = self._cluster
        try:
            while not self._stopping:
                self._poller.poll()
                self._gate.serve()
                self._watch()
                self._obey()
                self._announce()
        except LapseError as error:  # from making the sockets
            self._send("fail", {"rank": None, "how": "said", "cause": str(error)})
            with cluster._cond:
                cluster._refused = str(error)
                cluster._over = True
                cluster._cond.notify_all()
        except Exception as error:
            log.exception("the control thread stopped")
            self._send("fail", {"rank": None, "how": "said", "cause": f"the control thread stopped: {error!r}"})
            self._verdict(f"the control thread stopped: {error!r}")
            self._announce()
        finally:
            self._dealer.close()
            self._dealer_monitor.close()
            self._gate.sock.close(0)

    # -- the loop's parts

    def _watch(self) -> None:
        """Read the monitors, then the messages that came before what they tell, then act on it."""
        lost = self._drain_dealer_monitor()
        broken = self._drain_monitors()
        self._receive()
        if lost and not self._disconnected:
            self._disconnected = True
            self._dealer.disconnect(sockets.endpoint(self._address, self._config.root_port))
        if self._cluster._over or self._cluster._left:
            return
        if lost:
            self._verdict(f"the connection to the scheduler at {self._config.root_host}:{self._config.root_port} broke, or it does "
                          "not answer heartbeats")
            return
        for rank in broken:
            if not self._cluster._goodbyes and rank not in self._reported:
                self._reported.add(rank)
                self._send("fail", {"rank": rank, "how": "lost", "cause": LOST_TEXT})

    def _obey(self) -> None:
        self._waker.clear()
        while self._outbox:
            entry = self._outbox.popleft()
            if entry[0] == "send":
                self._send(entry[1], entry[2])
            elif entry[0] == "heard":
                for _ in self._drain_pull_monitor():
                    pass
                if entry[2] in self._pull_open:
                    self._pull_open[entry[2]] = entry[1]
            elif entry[0] == "stop":
                self._stopping = True

    def _announce(self) -> None:
        """Call on_failure once, without a lock; before the node is up the constructor raises instead."""
        cluster = self._cluster
        with cluster._cond:
            failure = cluster.failure if cluster._up and not self._announced else None
            self._announced = self._announced or failure is not None
        if failure is not None:
            cluster._on_failure(failure)

    def _send(self, kind: str, fields: dict) -> None:
        try:
            self._dealer.send(control.encode(kind, **fields), zmq.DONTWAIT)
        except zmq.ZMQError as error:
            log.debug("cannot send %r to the scheduler: %s", kind, error)

    def _receive(self) -> None:
        while True:
            try:
                frames = self._dealer.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            try:
                message = control.decode(frames)
            except control.Malformed as error:
                self._verdict(f"the scheduler sent something else than a message: {error}")
                return
            if self._config.verbose > 1:
                log.debug("control: %s", message)
            if self._cluster._over:
                continue
            if message["type"] == "welcome":
                self._bind(message)
            elif message["type"] == "table":
                self._connect(message["endpoints"])
            self._cluster._handle(message)

    def _verdict(self, cause: str) -> None:
        """This node's own word about the scheduler; there is nobody else to ask."""
        cluster = self._cluster
        with cluster._cond:
            cluster._end(Failure(None, self._config.root_host, self._scheduler_pid, cause,
                                 f"node {cluster.rank}" if cluster.members else f"pid {os.getpid()}"))
            cluster._cond.notify_all()

    # -- starting: bind, tell the scheduler, connect

    def _drain_dealer_monitor(self) -> bool:
        """True when the connection with the scheduler broke."""
        lost = False
        for event, _ in self._dealer_monitor.events():
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED and not self.joined:
                self.joined = True
                self._send("join", self._join)
            elif event == zmq.EVENT_DISCONNECTED:
                lost = lost or self.joined
            else:
                self.obstacle = sockets.refused_by(event) or self.obstacle
                if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH and not self.joined:
                    with self._cluster._cond:
                        where = f"{self._config.root_host}:{self._config.root_port}"
                        self._cluster._refused = f"cannot join the job: the scheduler at {where} refused this node's token (LAPSE_TOKEN)"
                        self._cluster._over = True
                        self._cluster._cond.notify_all()
        return lost

    def _bind(self, welcome: dict) -> None:
        """Make the PULL socket and bind it where the peers will look for it."""
        cluster, config = self._cluster, self._config
        rank, num_nodes = welcome["rank"], len(welcome["members"])
        if num_nodes != config.num_nodes or rank >= num_nodes:
            raise LapseError("the scheduler's welcome is not for this job")
        self._scheduler_pid = welcome["pid"]
        self._places = [member["place"] for member in welcome["members"]]
        self._gate.admit_ranks(rank, num_nodes)
        ways = {self._way(rank, peer) for peer in range(num_nodes) if peer != rank} or {"ipc"}
        if config.transport == "ipc" and len(set(self._places)) > 1:
            raise LapseError("transport ipc, but the nodes do not all run on one host (and as one user)")
        cluster.pull = pull = sockets.make(cluster.context, zmq.PULL, config, max_bytes=cluster._max_message)
        sockets.serve(pull, config, sockets.DATA_DOMAIN)
        self._pull_monitor = sockets.Monitor(pull)
        self._poller.register(self._pull_monitor.pair, zmq.POLLIN)
        endpoints = {}
        if "ipc" in ways:
            if config.ipc_dir is None:
                self._folder = ipc.Folder()
            endpoints["ipc"] = sockets.bind_ipc(pull, config.ipc_dir or self._folder.path, f"{welcome['job']:x}-{rank}")
        if "tcp" in ways:
            own = hosts.resolve(config.node_host) if config.node_host else hosts.address_towards(self._address)
            endpoints["tcp"] = sockets.bind_tcp(pull, own, config)
        cluster._connect_self()
        self._send("bound", {"endpoints": endpoints})

    def _way(self, rank: int, peer: int) -> str:
        if self._config.transport != "auto":
            return self._config.transport
        return "ipc" if self._places[rank] == self._places[peer] else "tcp"

    def _connect(self, table: list[dict]) -> None:
        """One PUSH socket per peer. All have bound: a connection that fails is a failure, nothing is tried twice."""
        cluster, config = self._cluster, self._config
        own = cluster.push[0]
        push = []
        for peer, endpoints in enumerate(table):
            if peer == cluster.rank:
                push.append(own)
                continue
            sock = sockets.make(cluster.context, zmq.PUSH, config, max_bytes=cluster._max_message)
            push.append(sock)
            sockets.no_reconnect(sock)
            sockets.identify(sock, config, str(cluster.rank).encode())
            monitor = self._monitors[peer] = sockets.Monitor(sock)
            self._poller.register(monitor.pair, zmq.POLLIN)
            self._unconnected.add(peer)
            way = self._way(cluster.rank, peer)
            if way not in endpoints:
                raise LapseError(f"node {peer} does not listen on {way}")
            sock.setsockopt(zmq.IPV6, "[" in endpoints[way])
            sock.connect(endpoints[way])
        cluster.push = push
        self._check_up()

    def _check_up(self) -> None:
        if not self._unconnected and len(self._cluster.push) == self._config.num_nodes:
            with self._cluster._cond:
                self._cluster._up = True
                self._cluster._cond.notify_all()

    # -- liveness

    def _drain_monitors(self) -> list[int | None]:
        """The ranks of peers whose data connection broke (None: one that has not said HELLO)."""
        broken: list[int | None] = []
        for rank, monitor in self._monitors.items():
            for event, _ in monitor.events():
                if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    self._unconnected.discard(rank)
                    self._check_up()
                elif event in (zmq.EVENT_DISCONNECTED, zmq.EVENT_CLOSED) or sockets.refused_by(event):
                    broken.append(rank)
        if self._pull_monitor is not None:
            broken += self._drain_pull_monitor()
        return broken

    def _drain_pull_monitor(self) -> list[int]:
        broken = []
        for event, value in self._pull_monitor.events():
            if event == zmq.EVENT_ACCEPTED:
                self._pull_open[value] = None
            elif event == zmq.EVENT_DISCONNECTED:
                rank = self._pull_open.pop(value, None)
                if rank is not None:
                    broken.append(rank)
        return broken

    # -- ending (called by the thread that closes, after the control thread has been joined)

    def close_monitored(self) -> None:
        """Close the data sockets before the monitors: libzmq blocks when nobody takes a monitor's events."""
        cluster = self._cluster
        linger = 1000 if cluster.failure is None and cluster._left else 0
        for sock in [*cluster.push, getattr(cluster, "pull", None)]:
            if sock is not None:
                sock.close(linger)
        for monitor in [*self._monitors.values(), self._pull_monitor]:
            if monitor is not None:
                monitor.close()

    def clean_up(self) -> None:
        self._waker.close()
        if self._folder is not None:
            self._folder.remove()


def _join_message(config: Config, description: dict) -> dict:
    return {"type": "join", "version": control.VERSION, "nodes": config.num_nodes, "threads": config.num_threads,
            "host": hosts.host_name(), "place": hosts.place(), "pid": os.getpid(), "hint": config.rank_hint,
            "description": description, "join_timeout": config.join_timeout, "barrier_warning": config.barrier_warning}
