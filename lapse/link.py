"""The control thread of a node: its connection with the scheduler, the making of its data sockets, the monitors, the gate.

The other half of cluster.Cluster, whose `_cond` guards what the two share. This thread alone uses the DEALER, the monitors and the
gate; other threads hand it commands. `Cluster.pull` and `Cluster.push` are made here, and belong to the Cluster's owner once its
constructor has returned.

What a monitor tells is acted upon only after the messages that came before it: a peer's last word is heard before its end.
"""
from __future__ import annotations

import logging
import os
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

import zmq

from lapse import control, hosts, ipc, sockets
from lapse.control import Failure
from lapse.coordinator import LOST_TEXT
from lapse.errors import LapseError

if TYPE_CHECKING:
    from lapse.cluster import Cluster

log = logging.getLogger("lapse.cluster")

RECONNECT_MS = 50           # at start, until the scheduler is there
RECONNECT_MAX_MS = 1000


class Link:
    """`run` is the thread's function; `command` may be called by any thread, the last two methods by the one that closes."""

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
        self._ipc = ""                          # the own socket; libzmq leaves its file behind
        self._places: list[str] = []
        self._keys: list[str] = []              # the nodes' public keys
        self._monitors: dict[int, sockets.Monitor] = {}     # rank -> of push[rank]
        self._pull_monitor: sockets.Monitor | None = None
        self._unconnected: set[int] = set()     # peers whose handshake is still awaited
        self._pull_open: dict[int, int | None] = {}  # connections to the PULL: descriptor -> rank, where known
        self._pull_gone: set[int] = set()       # descriptors of those that ended before it was known whose they were
        self._broken: list[int] = []            # peers whose data connection broke, as the monitors told, to be acted upon
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
        sockets.identify(self._dealer, config, sockets.CONTROL_USER, config.keys.scheduler if config.keys else "")
        self._dealer_monitor = sockets.Monitor(self._dealer)
        self._poller = zmq.Poller()
        for source in (self._waker.fd, self._dealer, self._dealer_monitor.pair, self._gate.sock):
            self._poller.register(source, zmq.POLLIN)
        self._source = sockets.reserve_source(address, config.root_port)    # until connected
        self._scheduler = sockets.endpoint_from(self._source, sockets.endpoint(address, config.root_port))
        self._dealer.connect(self._scheduler)

    @property
    def refused(self) -> int:
        """Connections that were not admitted so far. Any thread."""
        return self._gate.refused

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
        self._drain_monitors()
        broken, self._broken = self._broken, []
        self._receive()
        if lost and not self._disconnected:
            self._disconnected = True
            self._dealer.disconnect(self._scheduler)
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
                self._drain_pull_monitor()
                # With several I/O threads a message may come before the monitor tells of its connection, whose descriptor another one had.
                if entry[2] in self._pull_gone and self._config.zmq_threads == 1:
                    self._broken.append(entry[1])
                else:
                    self._pull_open[entry[2]] = entry[1]
            elif entry[0] == "stop":
                self._stopping = True
        if self._broken:
            self._waker.wake()                  # _watch acts on it, after the messages that are there by now

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
                self._release_source()
                self._send("join", self._join)
            elif event == zmq.EVENT_DISCONNECTED:
                lost = lost or self.joined
            else:
                refusal = sockets.refused_by(event, self._config.mode)
                self.obstacle = refusal or self.obstacle
                if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH and not self.joined:
                    with self._cluster._cond:
                        where = f"{self._config.root_host}:{self._config.root_port}"
                        what = refusal.removeprefix("it ")
                        self._cluster._refused = f"cannot join the job: the scheduler at {where} {what}"
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
        self._keys = [member["key"] for member in welcome["members"]]
        if config.mode == "curve" and (self._keys[rank] != config.keys.public or "" in self._keys):
            raise LapseError("the scheduler's table of keys is not that of this job")
        self._gate.admit_ranks(rank, num_nodes, self._keys)
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
            self._ipc = sockets.bind_ipc(pull, config.ipc_dir or self._folder.path, f"{welcome['job']:x}-{rank}")
            endpoints["ipc"] = self._ipc
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
            sockets.identify(sock, config, str(cluster.rank).encode(), self._keys[peer])
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

    def _drain_monitors(self) -> None:
        """Note in _broken the ranks of peers whose data connection broke."""
        for rank, monitor in self._monitors.items():
            for event, _ in monitor.events():
                if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    self._unconnected.discard(rank)
                    self._check_up()
                elif event in (zmq.EVENT_DISCONNECTED, zmq.EVENT_CLOSED) or sockets.refused_by(event, self._config.mode):
                    self._broken.append(rank)
        if self._pull_monitor is not None:
            self._drain_pull_monitor()

    def _drain_pull_monitor(self) -> None:
        for event, value in self._pull_monitor.events():
            if event == zmq.EVENT_ACCEPTED:
                self._pull_open.setdefault(value, None)
                self._pull_gone.discard(value)
            elif event == zmq.EVENT_DISCONNECTED:
                rank = self._pull_open.pop(value, None)
                if rank is None:
                    self._pull_gone.add(value)
                else:
                    self._broken.append(rank)
            elif event in sockets.UNFINISHED:
                self._gate.refuse()

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

    def _release_source(self) -> None:
        if self._source is not None:
            self._source.close()

    def clean_up(self) -> None:
        self._waker.close()
        self._release_source()
        if self._ipc:
            Path(self._ipc.removeprefix("ipc://")).unlink(missing_ok=True)
        if self._folder is not None:
            self._folder.remove()
