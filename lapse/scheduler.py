"""The scheduler of a job: a ROUTER socket around the Coordinator. It holds no parameter.

A process of its own under the dmlc trackers (`lapse.scheduler`), a thread of the launcher when Lapse launches itself. One thread
runs `run`; the other methods may be called from any thread.

A dead node is noticed by the monitor of the ROUTER, which names connections by their file descriptor; messages carry the same
descriptor (ZMQ_SRCFD), and so a connection gets a member. Descriptors are used again: `_open` holds the connections that are
open at this point of the monitor's stream, which is always read before a new peer's first message is looked at.
"""
from __future__ import annotations

import logging
import os
import time
from collections import deque
from functools import partial

import zmq

from lapse import control, hosts, sockets
from lapse.config import Config
from lapse.control import Failure
from lapse.coordinator import Coordinator
from lapse.errors import LapseError

log = logging.getLogger("lapse.cluster")

PATIENCE = 10       # join timeouts until a scheduler that no node has joined gives up
FAREWELL = 2.0      # seconds for the last messages to leave


class Scheduler:
    """Scheduler(config).run() returns None after a normal end, or the Failure that ended the job.

    `launched`: a launcher owns it and tells how processes end (`process_ended`); it then also decides when to give up.
    `on_end` is called, from the running thread, as soon as the outcome is known.
    """

    def __init__(self, config: Config, *, launched: bool = False, on_end=None):
        self._config = config
        self._launched = launched
        self._on_end = on_end
        self._commands: deque = deque()
        self._waker = sockets.Waker()
        self._pid = os.getpid()
        self.strangers = 0                              # frames that no member sent
        self._peers: dict[bytes, _Connection] = {}      # routing id -> its connection
        self._open: dict[int, _Connection] = {}         # descriptor -> its connection, as of the monitor
        self._gone: list[_Connection] = []
        self.context = zmq.Context(io_threads=1)
        try:
            self._gate = sockets.Gate(self.context, config)
            self._router = sockets.make(self.context, zmq.ROUTER, config, max_bytes=control.MAX_BYTES)
            self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
            self._router.setsockopt(zmq.LINGER, int(FAREWELL * 1000))
            sockets.serve(self._router, config, sockets.CONTROL_DOMAIN)
            self._monitor = sockets.Monitor(self._router)
            self.address = hosts.resolve(config.root_host)
            if not config.authenticated:
                warn_unauthenticated(self.address)
            bound = sockets.bind_tcp(self._router, self.address, config, config.root_port)
        except BaseException:
            self.context.destroy(linger=0)
            self._waker.close()
            raise
        self.port = int(bound.rpartition(":")[2])
        self._coordinator = Coordinator(config.num_nodes, self._send, pid=self._pid, launched=launched,
                                        keys=config.keys.nodes if config.mode == "curve" else ())
        log.info("the scheduler listens on %s, security: %s", bound, config.mode)

    @property
    def joined(self) -> int:
        """How many nodes have joined so far. Any thread."""
        return len(self._coordinator.members)

    def process_ended(self, rank: int, status: int, pid: int, host: str = "") -> None:
        """The launcher's word: how a node's process ended (subprocess's returncode). `host` is "" for this one."""
        self._command(partial(self._coordinator.ended, host=host), rank, status, pid)

    def accuse(self, rank: int | None, cause: str, host: str = "") -> None:
        """The launcher's word: the job fails, by this rank or (None) by something outside of the nodes."""
        self._command(partial(self._coordinator.accuse, host=host), rank, cause)

    def stop(self) -> None:
        """End `run`, whatever the state of the job; nodes that are still there notice that the scheduler is gone."""
        self._command(None)

    def run(self) -> Failure | None:
        """Serve until all nodes have left or the job has failed, then close everything."""
        coordinator = self._coordinator
        patience = None if self._launched else time.monotonic() + PATIENCE * self._config.join_timeout
        try:
            poller = zmq.Poller()
            for source in (self._waker.fd, self._router, self._monitor.pair, self._gate.sock):
                poller.register(source, zmq.POLLIN)
            running = True
            while running and not coordinator.over:
                due = coordinator.tick(time.monotonic())
                if coordinator.over:
                    break
                if patience is not None and not coordinator.members:
                    if time.monotonic() > patience:
                        raise LapseError(f"no node has joined the scheduler on {self._where()} in "
                                         f"{PATIENCE * self._config.join_timeout:.0f} s")
                    due = patience
                if not self._gone:
                    poller.poll(None if due is None else max(0, (due - time.monotonic()) * 1000 + 1))
                self._gate.serve()
                running = self._obey()
                self._serve()
            if self._on_end is not None:
                self._on_end(coordinator.failure)
            return coordinator.failure
        finally:
            self.close()

    def close(self) -> None:
        """Close all sockets; the last messages get a moment to leave."""
        if os.getpid() != self._pid or self.context.closed:
            return
        self._router.close()
        self._monitor.close()
        self._gate.sock.close(0)
        self.context.term()
        self._waker.close()

    # -- inside

    def _where(self) -> str:
        return f"{self._config.root_host}:{self.port}"

    def _command(self, method, *args) -> None:
        self._commands.append((method, args))
        self._waker.wake()

    def _obey(self) -> bool:
        self._waker.clear()
        while self._commands:
            method, args = self._commands.popleft()
            if method is None:
                return False
            method(*args, time.monotonic())
        return True

    def _send(self, peer: bytes, kind: str, fields: dict) -> None:
        try:
            self._router.send_multipart([peer, control.encode(kind, **fields)], zmq.DONTWAIT)
        except zmq.ZMQError as error:
            log.debug("cannot send %r: %s", kind, error)  # the monitor tells that it is gone

    def _serve(self) -> None:
        """Everything that has arrived. Messages come before the end of their connection: a node that says why it goes is heard."""
        self._drain_monitor()
        gone, self._gone = self._gone, []
        for _ in range(1000):
            try:
                frames = self._router.recv_multipart(zmq.DONTWAIT, copy=False)
            except zmq.Again:
                break
            self._receive(frames)
        else:
            self._gone = gone + self._gone
            return
        now = time.monotonic()
        for connection in gone:
            if connection.peer is not None:
                self._coordinator.lost(connection.peer, now)
                self._peers.pop(connection.peer, None)

    def _receive(self, frames: list[zmq.Frame]) -> None:
        peer = frames[0].bytes
        now = time.monotonic()
        try:
            message = control.decode([frame.bytes for frame in frames[1:]])
        except control.Malformed as error:
            if not self._coordinator.violation(peer, str(error), now):
                self.strangers += 1
                if self.strangers & (self.strangers - 1) == 0:  # the 1st, 2nd, 4th, 8th, ...
                    log.warning("dropped a frame from %s: %s (%d so far)", frames[-1].get("Peer-Address"), error, self.strangers)
            return
        if peer not in self._peers:
            self._drain_monitor()
            connection = self._open.get(frames[-1].get(zmq.SRCFD))
            if connection is None or connection.peer is not None:
                log.debug("a node has gone before its first message was read")
                return
            connection.peer = peer
            self._peers[peer] = connection
        if self._config.verbose > 1:
            log.debug("control: %s", message)
        if message["type"] == "join" and self._config.mode == "curve" and str(message["hint"]) != (user := frames[-1].get("User-Id")):
            reason = f"its key is that of node {user}, not of node {message['hint']}"
            log.warning("refused a node (%s, pid %d): %s", message["host"], message["pid"], reason)
            self._send(peer, "refused", {"reason": reason})
            return
        self._coordinator.message(peer, message, now)

    def _drain_monitor(self) -> None:
        for event, value in self._monitor.events():
            if event == zmq.EVENT_ACCEPTED:
                self._open[value] = _Connection()
            elif event == zmq.EVENT_DISCONNECTED:
                connection = self._open.pop(value, None)
                if connection is not None:
                    self._gone.append(connection)
            elif event in sockets.UNFINISHED:
                self._gate.refuse()


class _Connection:
    """A connection to the ROUTER, and, from its first message on, the peer behind it."""

    __slots__ = ("peer",)

    def __init__(self):
        self.peer: bytes | None = None


def warn_unauthenticated(address: str) -> None:
    log.warning("no token (LAPSE_TOKEN) and no keys (LAPSE_KEYS), or security 'none': whoever can reach %s can join this job and change "
                "its parameters", address)
