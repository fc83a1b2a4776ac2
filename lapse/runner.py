"""Run a command as the nodes of one job: what `python -m lapse run` and the programs in tracker/ do.

The nodes run on this host, or where another `place` starts them (lapse/ssh.py). The scheduler is a thread here. One loop, in the
calling thread, reads the nodes' output, sees them end and obeys signals. Each node has a process group of
its own, so that Ctrl-C in a terminal reaches this process alone, and so that what a node starts can be ended with it. A node's process
is reaped last: until then its number, and that of its group, cannot go to a stranger's process.
"""
from __future__ import annotations

import errno
import logging
import os
import selectors
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lapse import hosts, ipc, sockets
from lapse.config import Config
from lapse.control import Failure
from lapse.coordinator import GATHER_LAUNCHER
from lapse.errors import LapseError, failure_text
from lapse.keys import Secrets
from lapse.output import Output, target_of
from lapse.processes import KILL_AFTER, NOT_PASSED_ON, CommandError, Here, Node, Stream, job_environment
from lapse.scheduler import Scheduler

if TYPE_CHECKING:
    from lapse.ssh import Ssh

log = logging.getLogger("lapse.launch")

READ_BYTES = 1 << 16
FAILURE_GRACE = 1.5         # seconds in which nodes may end by themselves after a failure ...
INTERRUPT_GRACE = 3.0       # ... or after Ctrl-C
POLL = 0.05                 # where the system has no pidfd


def scheduler_config(nodes: int, host: str, secrets: Secrets, environ, **settings) -> Config:
    """The settings of a scheduler that the launcher runs itself."""
    rest = {name: value for name, value in environ.items() if name not in NOT_PASSED_ON}
    return Config.make(1, 1, environ=rest, role="scheduler", num_nodes=nodes, root_host=host, token=secrets.token, keys=secrets.scheduler,
                       **settings)


def run(command: Sequence[str], nodes: int, *, stdout=None, stderr=None, environ=None, place: Here | Ssh | None = None) -> int:
    """Run `command` as `nodes` nodes and return the exit code for this process: 0 when all nodes ended with 0.

    Else the code of the node that failed first (128 + n when signal n killed it; 1 when it did not end by itself), 130 after
    Ctrl-C, 127 or 126 when the command cannot be executed. `place` is where the nodes run, this host when it is None. Every line of
    output gets the prefix "[node N] ", or "[node N HOST] ". Nodes read nothing from standard input. Signals are handled when this is
    called from the main thread.
    """
    try:
        if nodes < 1:
            raise CommandError(f"{nodes} nodes: at least one is needed", 2)
        if not command:
            raise CommandError("no command given", 2)
        place = place or Here()
        place.check(list(command))
        environ = dict(os.environ if environ is None else environ)
        security = place.security(environ)
    except CommandError as error:
        log.error("%s", error)
        return error.code
    return _Run(list(command), nodes, stdout, stderr, environ, place, security).run()


class _Run:
    def __init__(self, command: list[str], nodes: int, stdout, stderr, environ: dict[str, str], place: Here | Ssh, security: str | None):
        self._command = command
        self._place = place
        self._security = security
        self._num_nodes = nodes
        self._environ = environ
        self._selector = selectors.DefaultSelector()
        self._waker = sockets.Waker()
        self._output = Output(self._waker.wake)
        self._sinks = tuple(self._output.to(target_of(given, own)) for given, own in ((stdout, sys.stdout), (stderr, sys.stderr)))
        self._held: list[Stream] = []               # not read from now, because our own output is not taken
        self._trouble = ""                          # why it cannot be written
        self._signals: list[int] = []
        self._stopped_by = 0                        # the signal that ended the job
        self._to_start: deque = deque()             # (rank, its variables)
        self._nodes: list[Node] = []                # by rank
        self._failed: list[Node] = []              # in time
        self._plan: list[tuple[float, int]] = []    # (when, signal) still to be sent to all
        self._ending = False
        self._streams = 0
        self._verdict: Failure | None = None
        self._decided = threading.Event()

    def run(self) -> int:
        handlers = self._catch_signals()
        folder = scheduler = thread = None
        try:
            try:
                folder = ipc.Folder() if self._place.folder_here else None
                host = self._place.root_host(self._environ)
                self._place.prepare(lambda: bool(self._signals))
                if self._signals:
                    self._obey_signals(time.monotonic())
                    return self._outcome()
                secrets = Secrets.make(self._num_nodes, self._security)
                config = scheduler_config(self._num_nodes, host, secrets, self._environ, security=self._security)
                scheduler = Scheduler(config, launched=True, on_end=self._on_end)
            except (LapseError, ValueError) as error:
                log.error("%s", error)
                return getattr(error, "code", 1)
            self._scheduler = scheduler
            thread = threading.Thread(target=self._schedule, name="lapse-scheduler", daemon=True)
            thread.start()
            self._selector.register(self._waker.fd, selectors.EVENT_READ, None)
            try:
                self._to_start.extend((rank, job_environment(rank, self._num_nodes, host, scheduler.port, secrets, folder and folder.path))
                                      for rank in range(self._num_nodes))
                self._loop()
            except LapseError as error:
                log.error("%s", error)
                return 1
            finally:
                self._end_everything()
                self._output.close(lambda: bool(self._stopped_by or self._signals))
            return self._outcome()
        finally:
            if thread is not None:
                scheduler.stop()
                thread.join()
            self._output.close(lambda: True)
            self._selector.close()
            if folder is not None:
                folder.remove()
            self._restore_signals(handlers)
            self._waker.close()

    # -- starting

    def _start_nodes(self) -> None:
        """Start as many as may be started now; none any more once the job is about to end."""
        if self._ending:
            self._to_start.clear()
        while self._to_start and self._place.may_start(self._to_start[0][0]):
            self._start(*self._to_start.popleft())

    def _start(self, rank: int, job: dict[str, str]) -> None:
        try:
            node = self._place.start(rank, self._command, self._environ, job)
        except OSError as error:
            raise LapseError(f"cannot start node {rank} of {self._num_nodes}: {error.strerror}") from None
        self._nodes.append(node)
        log.info("started node %d, pid %d", rank, node.process.pid)
        for stream in node.streams(self._place.prefix(rank), self._sinks):
            os.set_blocking(stream.pipe.fileno(), False)
            self._selector.register(stream.pipe, selectors.EVENT_READ, stream)
            self._streams += 1
        try:
            node.pidfd = os.pidfd_open(node.process.pid)
            self._selector.register(node.pidfd, selectors.EVENT_READ, node)
        except (AttributeError, OSError):
            node.pidfd = None

    def _catch_signals(self) -> dict:
        handlers = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:  # nohup stays nohup
                    handlers[number] = signal.signal(number, self._on_signal)
        return handlers

    def _restore_signals(self, handlers: dict) -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame) -> None:
        self._signals.append(number)
        self._waker.wake()

    def _schedule(self) -> None:
        try:
            self._scheduler.run()
        except Exception as error:
            log.exception("the scheduler stopped")
            self._on_end(Failure(None, "", 0, f"the scheduler stopped: {error!r}", "the launcher"))

    def _on_end(self, failure: Failure | None) -> None:
        """Called by the scheduler's thread when the job is over."""
        self._verdict = failure
        self._decided.set()
        self._waker.wake()

    # -- the loop

    def _loop(self) -> None:
        """Until all nodes have ended, and a moment longer for what their children still write."""
        drain_until = None
        while True:
            now = time.monotonic()
            self._obey_signals(now)
            self._look_for_ended(now)
            self._look_at_output(now)
            self._read_again()
            if self._decided.is_set() and self._verdict is not None:
                self._end_stopped()
                self._end_soon(now, FAILURE_GRACE)
            while self._plan and now >= self._plan[0][0]:
                self._signal_all(self._plan.pop(0)[1])
            self._start_nodes()
            if not self._to_start and all(node.status is not None for node in self._nodes):
                if drain_until is None:
                    for node in self._nodes:
                        node.signal(signal.SIGTERM)  # what it left behind in its group
                if drain_until is None or (self._held and not self._stopped_by):
                    drain_until = now + POLL
                if not self._streams or now >= drain_until + KILL_AFTER:
                    return
            self._read(self._pause(now, drain_until))

    def _pause(self, now: float, drain_until: float | None) -> float | None:
        due = [self._plan[0][0]] if self._plan else []
        if drain_until is not None:
            due.append(drain_until + KILL_AFTER)
        if any((node.status is None and node.pidfd is None) or node.restless for node in self._nodes):
            due.append(now + POLL)
        return max(0.0, min(due) - now) if due else None

    def _read(self, timeout: float | None) -> None:
        for key, _ in self._selector.select(timeout):
            if key.data is None:
                self._waker.clear()
            elif isinstance(key.data, Stream):
                self._copy(key.data)
        for node in self._nodes:
            node.serve()

    def _copy(self, stream: Stream) -> None:
        try:
            data = os.read(stream.pipe.fileno(), READ_BYTES)
        except BlockingIOError:
            return
        stream.feed(data)
        if not data:
            self._selector.unregister(stream.pipe)
            stream.pipe.close()
            self._streams -= 1
        elif self._output.full:
            self._selector.unregister(stream.pipe)
            self._held.append(stream)

    def _read_again(self) -> None:
        if self._held and not self._output.full:
            for stream in self._held:
                self._selector.register(stream.pipe, selectors.EVENT_READ, stream)
            self._held.clear()

    def _look_at_output(self, now: float) -> None:
        for error in self._output.errors():
            if getattr(error, "errno", None) == errno.EPIPE:
                self._on_signal(signal.SIGPIPE, None)   # whoever read our output has gone
            else:
                self._trouble = self._trouble or getattr(error, "strerror", None) or repr(error)
                self._end_soon(now, 0.0)

    def _look_for_ended(self, now: float) -> None:
        for node in self._nodes:
            if node.look():
                log.info("node %d (pid %d) %s", node.rank, node.pid, node.how)
                if node.pidfd is not None:
                    self._selector.unregister(node.pidfd)
                    os.close(node.pidfd)
                if node.trouble:
                    self._scheduler.accuse(node.rank, node.trouble, node.host)
                elif not (node.signalled and node.status < 0):
                    self._scheduler.process_ended(node.rank, node.status, node.pid, node.host)
                if node.failed_by_itself:
                    self._failed.append(node)
                    self._end_soon(now, FAILURE_GRACE)

    def _obey_signals(self, now: float) -> None:
        while self._signals:
            number = self._signals.pop(0)
            again = bool(self._stopped_by)
            self._stopped_by = self._stopped_by or number
            self._ending = True
            if number == signal.SIGINT and not again:
                self._signal_all(signal.SIGINT)
                self._plan = _plan(now + INTERRUPT_GRACE)
                words = threading.Thread(target=log.warning, args=("interrupted; ending the nodes",), daemon=True)
                words.start()           # nobody may be reading our standard error
                words.join(POLL)
            else:
                at_once = [(now, signal.SIGKILL)]
                self._plan = at_once if again and len(self._plan) < 2 else _plan(now)

    def _end_soon(self, now: float, grace: float) -> None:
        """One node failed: the others get the library's NodeFailure now, and a signal if that does not end them."""
        if not self._ending:
            self._ending = True
            self._plan = _plan(now + grace)

    def _end_stopped(self) -> None:
        """The node that the job failed by is stopped: it will not end by itself, so there is no grace for it."""
        rank = self._verdict.rank
        if not self._ending and rank is not None and rank < len(self._nodes):
            node = self._nodes[rank]
            if node.status is None and hosts.process_state(node.process.pid) == hosts.STOPPED:
                self._signal(node, signal.SIGTERM)

    def _signal_all(self, number: int) -> None:
        for node in self._nodes:
            if node.status is None:
                self._signal(node, number)

    def _signal(self, node: Node, number: int) -> None:
        log.info("sending signal %d to node %d (pid %d)", number, node.rank, node.pid)
        node.signal(number)
        if number == signal.SIGTERM:
            node.signal(signal.SIGCONT)     # a stopped process would not notice

    def _end_everything(self) -> None:
        """Leave nothing behind: end the groups, then reap."""
        for node in self._nodes:
            node.signal(signal.SIGKILL)
        deadline = time.monotonic() + KILL_AFTER
        for node in self._nodes:
            node.end(deadline)

    # -- the end

    def _outcome(self) -> int:
        """Say what went wrong, if anything, and return the exit code."""
        self._look_at_output(time.monotonic())
        if signal.SIGPIPE in self._signals:
            self._stopped_by = self._stopped_by or signal.SIGPIPE
        if self._stopped_by:
            log.error("ended by signal %d (%s)", self._stopped_by, signal.Signals(self._stopped_by).name)
            return 128 + self._stopped_by
        if self._trouble:
            log.error("cannot write the output of the nodes: %s", self._trouble)
            return 1
        if self._scheduler.joined:
            self._decided.wait(2 * GATHER_LAUNCHER)  # nodes may have said more than their exit codes do
        verdict, first = self._verdict, self._failed[0] if self._failed else None
        if verdict is None:
            if first is None:
                return 0
            log.error("%s", failure_text(first.rank, first.host, first.pid, first.how, ""))
            return _code(first.status)
        root = first
        if verdict.rank is not None:
            node = self._nodes[verdict.rank]
            root = node if node.failed_by_itself else None
            verdict = verdict._replace(host=node.host or verdict.host)     # as the user calls it
        how = root.how if root is not None else ""
        if how and how not in verdict.cause:
            who = "" if verdict.rank is not None else f"node {root.rank} "
            verdict = verdict._replace(cause=f"{verdict.cause} ({who}{how})")
        log.error("%s", failure_text(*verdict))
        return _code(root.status) if root is not None else 1


def _plan(start: float) -> list[tuple[float, int]]:
    return [(start, signal.SIGTERM), (start + KILL_AFTER, signal.SIGKILL)]


def _code(status: int) -> int:
    return status if status >= 0 else 128 - status
