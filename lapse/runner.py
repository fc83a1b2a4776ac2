"""Run a command as the nodes of one job: what `python -m lapse run` and the programs in tracker/ do.

The nodes run on this host, or where another `place` starts them (lapse/ssh.py). The scheduler is a thread here. One loop, in the
calling thread, reads the nodes' output, sees them end and obeys signals. Each node has a process group
of its own, so that Ctrl-C in a terminal reaches this process alone, and so that what a node starts can be ended with it. A node's
process is reaped last: until then its number, and that of its group, cannot go to a stranger's process.
"""
from __future__ import annotations

import contextlib
import errno
import logging
import os
import selectors
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lapse import _exec, ipc, sockets
from lapse.config import CLUSTER_VARIABLES, SECRETS, Config
from lapse.control import Failure
from lapse.coordinator import GATHER_LAUNCHER, end_text
from lapse.errors import LapseError, failure_text
from lapse.keys import Secrets
from lapse.scheduler import Scheduler

if TYPE_CHECKING:
    from lapse.ssh import Ssh

log = logging.getLogger("lapse.launch")

LINE_BYTES = 1 << 20        # a longer line is broken
READ_BYTES = 1 << 16
FAILURE_GRACE = 1.5         # seconds in which nodes may end by themselves after a failure ...
INTERRUPT_GRACE = 3.0       # ... or after Ctrl-C
KILL_AFTER = 2.0            # from SIGTERM to SIGKILL
POLL = 0.05                 # where the system has no pidfd
NOT_PASSED_ON = (*CLUSTER_VARIABLES, "DMLC_NODE_HOST", "DMLC_INTERFACE", "LAPSE_RANK", "LAPSE_IPC_DIR", "LAPSE_KEYS", *SECRETS)


class CommandError(LapseError):
    """The command cannot be executed; `code` is what a shell would return."""

    def __init__(self, text: str, code: int):
        super().__init__(text)
        self.code = code


def find_command(name: str) -> None:
    """Raise CommandError unless `name` can be executed."""
    if os.sep not in name:
        if shutil.which(name) is None:
            raise CommandError(f"{name}: command not found", 127)
    elif not Path(name).exists():
        raise CommandError(f"{name}: no such file", 127)
    elif not Path(name).is_file():
        raise CommandError(f"{name}: not a file", 126)
    elif not os.access(name, os.X_OK):
        raise CommandError(f"{name}: not executable", 126)


def job_environment(rank: int, nodes: int, host: str, port: int, secrets: Secrets, folder: str | None) -> dict[str, str]:
    """The variables by which a process finds its job; one of them is a secret. `folder` is for ipc sockets."""
    variables = {"DMLC_ROLE": "server", "DMLC_NUM_SERVER": str(nodes), "DMLC_NUM_WORKER": "0", "DMLC_PS_ROOT_URI": host,
                 "DMLC_PS_ROOT_PORT": str(port), "LAPSE_RANK": str(rank), **secrets.environment(rank)}
    return {**variables, "LAPSE_IPC_DIR": folder} if folder else variables


def scheduler_config(nodes: int, host: str, secrets: Secrets, environ, **settings) -> Config:
    """The settings of a scheduler that the launcher runs itself."""
    rest = {name: value for name, value in environ.items() if name not in NOT_PASSED_ON}
    return Config.make(1, 1, environ=rest, role="scheduler", num_nodes=nodes, root_host=host, token=secrets.token, keys=secrets.scheduler,
                       **settings)


def die_with_us() -> list[str]:
    """What to put before a command so that its process is killed when this one dies."""
    return [sys.executable, "-I", "-S", str(Path(_exec.__file__).absolute()), str(os.getpid())] if sys.executable else []


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


class Here:
    """This host: where the nodes of a job run when nothing else is said."""

    folder_here = True      # the launcher makes the folder for ipc sockets

    def check(self, command: list[str]) -> None:
        """Raise CommandError when it is clear that the command cannot be executed."""
        find_command(command[0])

    def security(self, environ: dict[str, str]) -> str | None:
        """The security mode of the job."""
        return environ.get("LAPSE_SECURITY") or None

    def root_host(self, environ: dict[str, str]) -> str:
        """Where the scheduler listens."""
        return "127.0.0.1"

    def prepare(self, interrupted: Callable[[], bool]) -> None:
        """What comes before the nodes; ends early when `interrupted()`."""

    def may_start(self, rank: int) -> bool:
        """Whether this node may be started now, or is to wait until something has happened to those that have been."""
        return True

    def prefix(self, rank: int) -> bytes:
        """What comes before each line that a node writes."""
        return b"[node %d] " % rank

    def start(self, rank: int, command: list[str], environ: dict[str, str], job: dict[str, str]) -> Node:
        """Start a node: `environ` is that of the launcher, `job` has the job's variables."""
        base = {name: value for name, value in environ.items() if name not in NOT_PASSED_ON}
        process = subprocess.Popen([*die_with_us(), *command], env={"PYTHONUNBUFFERED": "1", **base, **job}, stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, bufsize=0)
        return Node(rank, process)


class Stream:
    """One output stream of one node, cut into lines."""

    def __init__(self, prefix: bytes, pipe, sink):
        self.prefix = prefix
        self.pipe = pipe
        self.sink = sink
        self.rest = b""

    def feed(self, data: bytes) -> None:
        """Write all whole lines; b"" is the end of the stream, and of its last line."""
        text = self.rest + data
        lines = text.split(b"\n")
        self.rest = lines.pop()
        if len(self.rest) >= LINE_BYTES or (not data and self.rest):
            lines.append(self.rest)
            self.rest = b""
        lines = self.select(lines)
        if lines:
            self.sink.write(b"".join(self.prefix + line + b"\n" for line in lines))
            self.sink.flush()

    def select(self, lines: list[bytes]) -> list[bytes]:
        """Which of the lines, and which others, are written."""
        return lines


class Node:
    """One node of the job, and the process of this host that stands for it."""

    def __init__(self, rank: int, process: subprocess.Popen):
        self.rank = rank
        self.process = process
        self.pid = process.pid          # of the node
        self.host = ""                  # another one than this
        self.trouble = ""               # what happened to it, where its status does not say that
        self.status: int | None = None  # as subprocess's returncode; known before the process is reaped
        self.signalled = False          # by us: how it ended says nothing
        self.pidfd: int | None = None

    def streams(self, prefix: bytes, sinks) -> list[Stream]:
        """Its output, of which each line gets the prefix."""
        return [Stream(prefix, pipe, sink) for pipe, sink in zip((self.process.stdout, self.process.stderr), sinks, strict=True)]

    restless = False                    # it wants `serve` to be called now and then

    def serve(self) -> None:
        """What it has to do for itself; never blocks."""

    def end(self, deadline: float) -> None:
        """Reap the process, which has been killed, by the deadline where that takes something else than this host."""
        self.process.wait()
        for pipe in (self.process.stdout, self.process.stderr):
            pipe.close()

    def signal(self, number: int) -> None:
        """To the whole group, which exists at least as the unreaped process itself."""
        self.signalled = self.signalled or self.status is None
        if self.process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def look(self) -> bool:
        """Note how the process ended, without reaping it; True if it has just ended."""
        if self.status is not None:
            return False
        if not hasattr(os, "waitid"):  # macOS before CPython 3.13; then the group is not signalled any more
            self.status = self.process.poll()
            return self.status is not None
        end = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if end is None:
            return False
        self.status = end.si_status if end.si_code == os.CLD_EXITED else -end.si_status
        return True

    @property
    def how(self) -> str:
        """How it ended."""
        return self.trouble or end_text(self.status)

    @property
    def failed_by_itself(self) -> bool:
        return bool(self.status) and not (self.signalled and self.status < 0)


class _Run:
    def __init__(self, command: list[str], nodes: int, stdout, stderr, environ: dict[str, str], place: Here | Ssh, security: str | None):
        self._command = command
        self._place = place
        self._security = security
        self._num_nodes = nodes
        self._sinks = (_sink(stdout, sys.stdout), _sink(stderr, sys.stderr))
        self._environ = environ
        self._selector = selectors.DefaultSelector()
        self._waker = sockets.Waker()
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
            folder = ipc.Folder() if self._place.folder_here else None
            try:
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
            finally:
                self._end_everything()
            return self._outcome()
        finally:
            if thread is not None:
                scheduler.stop()
                thread.join()
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
        node = self._place.start(rank, self._command, self._environ, job)
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
            if self._decided.is_set() and self._verdict is not None:
                self._end_soon(now, FAILURE_GRACE)
            while self._plan and now >= self._plan[0][0]:
                self._signal_all(self._plan.pop(0)[1])
            self._start_nodes()
            if not self._to_start and all(node.status is not None for node in self._nodes):
                if drain_until is None:
                    drain_until = now + POLL
                    for node in self._nodes:
                        node.signal(signal.SIGTERM)  # what it left behind in its group
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
        try:
            stream.feed(data)
        except OSError as error:
            if error.errno != errno.EPIPE:
                raise
            self._signals.append(signal.SIGPIPE)  # whoever read our output has gone
            stream.sink = _Nowhere()
        if not data:
            self._selector.unregister(stream.pipe)
            stream.pipe.close()
            self._streams -= 1

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
                log.warning("interrupted; ending the nodes")
                self._signal_all(signal.SIGINT)
                self._plan = _plan(now + INTERRUPT_GRACE)
            else:
                at_once = [(now, signal.SIGKILL)]
                self._plan = at_once if again and len(self._plan) < 2 else _plan(now)

    def _end_soon(self, now: float, grace: float) -> None:
        """One node failed: the others get the library's NodeFailure now, and a signal if that does not end them."""
        if not self._ending:
            self._ending = True
            self._plan = _plan(now + grace)

    def _signal_all(self, number: int) -> None:
        for node in self._nodes:
            if node.status is None:
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
        if self._stopped_by:
            log.error("ended by signal %d (%s)", self._stopped_by, signal.Signals(self._stopped_by).name)
            return 128 + self._stopped_by
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


class _Nowhere:
    def write(self, data: bytes) -> None:
        pass

    def flush(self) -> None:
        pass


class _TextSink:
    """Bytes into a stream that takes text only (a notebook's)."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, data: bytes) -> None:
        self._stream.write(data.decode(errors="replace"))

    def flush(self) -> None:
        self._stream.flush()


def _sink(given, default):
    if given is not None:
        return given
    if default is None:
        return _Nowhere()
    default.flush()
    return getattr(default, "buffer", None) or _TextSink(default)
