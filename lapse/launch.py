"""Start the nodes of a job on this host: a Python function (`launch`), or a command line (`python -m lapse run`, `main`).

Design of `launch`. Every node is a process of its own, also when there is only one: what a function can see and how it fails is
then the same for 1 node and for 4. The processes are forked where that is possible, so that the function may be anything that the
caller has (a closure, a cell of a notebook, data that is not copied); they are all forked before the scheduler's thread and the
ZeroMQ context of this process exist, and learn by a pipe where the scheduler is. In a process that is itself a node now,
where fork would copy a running server, and on macOS, they are spawned, and the function must be importable.
"""
from __future__ import annotations

import argparse
import contextlib
import logging
import multiprocessing
import os
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait

from lapse import cluster, ipc
from lapse._exec import die_with_parent
from lapse.control import Failure
from lapse.coordinator import end_text
from lapse.errors import Interrupted, LapseError, NodeFailure, WorkerError
from lapse.keys import Secrets
from lapse.processes import KILL_AFTER, job_environment
from lapse.runner import run, scheduler_config
from lapse.scheduler import Scheduler

__all__ = ["launch", "main", "run"]

log = logging.getLogger("lapse.launch")

HOST = "127.0.0.1"
GRACE = 2.0     # seconds for the other nodes to hear of a failure


def launch(fn: Callable, nodes: int = 1, workers: int = 1, *, num_keys: int, value_length, dtype="float32", args: tuple = (),
           start_method: str | None = None, **setup) -> list[list]:
    """Run `fn(worker, *args)` in `workers` threads of each of `nodes` new processes; return the results as [node][worker].

    `value_length` (one int, or one per key) and `dtype` are those of `lapse.Server`, `**setup` the settings of `lapse.setup`.
    Results are handed over by pickle, and so are, with start_method "spawn", `fn` and `args`. An exception of a worker ends the
    job and is raised here as lapse.errors.WorkerError with its traceback's text; a process that dies is a NodeFailure.
    Blocking; Ctrl-C ends all nodes.
    """
    if nodes < 1 or workers < 1:
        raise ValueError(f"{nodes} nodes with {workers} workers: at least one of each is needed")
    if start_method is None:
        start_method = "spawn" if cluster.any_alive() or sys.platform == "darwin" else "fork"
    task = {"fn": fn, "args": tuple(args), "workers": workers, "num_keys": num_keys, "value_length": value_length,
            "dtype": dtype, "setup": setup}
    return _Launch(nodes, task, multiprocessing.get_context(start_method)).run()


class _Launch:
    """One call of `launch`: the processes, the pipes from and to them, the scheduler's thread."""

    def __init__(self, nodes: int, task: dict, context):
        self._num_nodes = nodes
        self._task = task
        self._context = context
        self._processes: list = []
        self._orders: list = []         # to each node: the environment of the job
        self._answers: list = []        # from each node
        self._results: dict[int, list] = {}
        self._error: WorkerError | None = None          # the first one that is not a consequence
        self._consequence: WorkerError | None = None
        self._died: tuple[int, int] | None = None       # (rank, status) of the first process that ended without an answer
        self._verdict: Failure | None = None
        self._scheduler: Scheduler | None = None
        self._give_up: float | None = None

    def run(self) -> list[list]:
        thread = folder = None
        try:
            for rank in range(self._num_nodes):
                self._start(rank)
            if self._num_nodes > 1:
                folder = ipc.Folder()
                security = self._task["setup"].get("security") or os.environ.get("LAPSE_SECURITY") or None
                secrets = Secrets.make(self._num_nodes, security)
                config = scheduler_config(self._num_nodes, HOST, secrets, os.environ, security=security)
                self._scheduler = Scheduler(config, launched=True, on_end=self._on_end)
                thread = threading.Thread(target=self._scheduler.run, name="lapse-scheduler", daemon=True)
                thread.start()
            for rank, order in enumerate(self._orders):
                with contextlib.suppress(BrokenPipeError):  # its end is noticed below
                    order.send({} if folder is None else job_environment(
                        rank, self._num_nodes, HOST, self._scheduler.port, secrets, folder.path))
            self._collect()
        finally:
            self._end_processes()
            if thread is not None:
                self._scheduler.stop()
                thread.join()
            for pipe in (*self._orders, *self._answers):
                pipe.close()
            if folder is not None:
                folder.remove()
        try:
            return self._outcome()
        finally:
            for process in self._processes:
                process.close()     # not when the garbage collector comes by: it holds two descriptors

    def _start(self, rank: int) -> None:
        order_in, order_out = self._context.Pipe(duplex=False)
        answer_in, answer_out = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_node_main, name=f"lapse-node-{rank}", daemon=False,
                                        args=(os.getpid(), rank, self._task, order_in, answer_out))
        try:
            process.start()
        finally:
            order_in.close()    # the child has its own; here they would hide that it has gone
            answer_out.close()
        self._processes.append(process)
        self._orders.append(order_out)
        self._answers.append(answer_in)

    def _on_end(self, failure: Failure | None) -> None:
        self._verdict = failure     # in the scheduler's thread; the nodes hear it too, and end

    def _collect(self) -> None:
        """Take the nodes' answers until all have given one, have died, or are not worth waiting for."""
        waiting = dict(enumerate(self._answers))
        while waiting:
            timeout = None
            if self._give_up is not None:
                timeout = self._give_up - time.monotonic()
                if timeout <= 0:
                    return
            for pipe in wait(list(waiting.values()), 0.2 if timeout is None else min(0.2, timeout)):
                rank = next(r for r, p in waiting.items() if p is pipe)
                if not self._take(rank, pipe):
                    del waiting[rank]
            if self._verdict is not None:
                self._fail_soon()

    def _take(self, rank: int, pipe) -> bool:
        """One answer; False when this node will give no other."""
        try:
            answer = pipe.recv()
        except (EOFError, OSError):
            self._note_end(rank)
            return False
        except Exception as error:  # a result that cannot be rebuilt here
            self._note_error(rank, WorkerError(rank, None, f"its result cannot be taken: {error!r}", ""), False)
            return False
        if answer[0] == "done":
            self._results[rank] = answer[1]
            return False
        _, worker, summary, text, consequence = answer
        self._note_error(rank, WorkerError(rank, worker, summary, text), consequence)
        return True

    def _note_error(self, rank: int, error: WorkerError, consequence: bool) -> None:
        if consequence:
            self._consequence = self._consequence or error
        else:
            self._error = self._error or error
            if self._scheduler is not None:
                self._scheduler.accuse(rank, error.summary)
        self._fail_soon()

    def _note_end(self, rank: int) -> None:
        process = self._processes[rank]
        process.join(GRACE)
        status = process.exitcode
        if status is None:
            status = 1  # it closed its pipe and runs on
        if rank not in self._results:
            self._died = self._died or (rank, status)
            if self._scheduler is not None:
                self._scheduler.process_ended(rank, status, process.pid)
            self._fail_soon()

    def _fail_soon(self) -> None:
        if self._give_up is None:
            self._give_up = time.monotonic() + GRACE

    def _end_processes(self) -> None:
        """Wait for those that are done; end the others."""
        if len(self._results) < self._num_nodes:
            for process in self._processes:
                process.terminate()
        deadline = time.monotonic() + KILL_AFTER
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode is None:
                process.kill()
                process.join()

    def _outcome(self) -> list[list]:
        if self._error is not None:
            raise self._error
        if self._verdict is not None and len(self._results) < self._num_nodes:
            raise NodeFailure(*self._verdict)
        if self._died is not None:
            rank, status = self._died
            raise NodeFailure(rank, "", self._processes[rank].pid, end_text(status), "the launcher")
        if self._consequence is not None:
            raise self._consequence
        return [self._results[rank] for rank in range(self._num_nodes)]


# -- in the node's process

def _node_main(parent: int, rank: int, task: dict, orders, answers) -> None:
    """The life of a node: run the workers, hand over their results, or the first exception as soon as it is raised."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)    # Ctrl-C reaches the launching process, which ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if os.getppid() == parent:     # not so with a fork server
        die_with_parent(parent)
    try:
        os.environ.update(orders.recv())
        results = _run_workers(task)
        answers.send(("done", results))
    except _WorkerRaised as error:
        _report(answers, error.worker, error.__cause__)
    except BaseException as error:
        _report(answers, None, error)
    else:
        return
    # Other workers may sit in calls that nothing will end.
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(1)


class _WorkerRaised(Exception):
    def __init__(self, worker: int):
        self.worker = worker


def _report(answers, worker: int | None, error: BaseException) -> None:
    summary = "".join(traceback.format_exception_only(type(error), error)).strip()
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    with contextlib.suppress(OSError):
        answers.send(("error", worker, summary, text, isinstance(error, (NodeFailure, Interrupted))))


def _run_workers(task: dict) -> list:
    import lapse

    count = task["workers"]
    lapse.setup(task["num_keys"], count, **task["setup"])
    server = lapse.Server(task["value_length"], dtype=task["dtype"])
    results: list = [None] * count
    errors: list[tuple[int, BaseException]] = []
    some_error = threading.Event()

    def work(number: int) -> None:
        try:
            worker = lapse.Worker(number, server)
            results[number] = task["fn"](worker, *task["args"])
            worker.finalize()
        except BaseException as error:
            errors.append((number, error))
            some_error.set()

    threads = [threading.Thread(target=work, args=(number,), name=f"lapse-worker-{number}", daemon=True)
               for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive() and not some_error.is_set():
            thread.join(0.05)
    if errors:
        number, error = errors[0]
        raise _WorkerRaised(number) from error
    server.shutdown()
    return results


# -- the command line

def main(argv: Sequence[str] | None = None, *, prog: str = "python -m lapse run") -> int:
    """`python -m lapse run -s N [options] COMMAND …`; the exit code of `run`, 2 for wrong options."""
    parser = argparse.ArgumentParser(
        prog=prog, allow_abbrev=False, usage=f"{prog} -s N [options] COMMAND [ARGUMENT ...]",
        description="Run COMMAND as the nodes of one job on this host. The job's address is in their environment; each line that "
                    "they write gets the prefix [node N]. When one fails, the others are ended, and its exit code is returned. "
                    "With --hosts, the nodes run on other hosts, over ssh.")
    add_options(parser)
    add_ssh_options(parser)
    options = parser.parse_args(argv)
    return run_with_options(parser, options, place_of(parser, options))


def add_options(parser: argparse.ArgumentParser) -> None:
    """What all our launching command lines take."""
    parser.add_argument("-s", "--num-servers", type=int, default=1, metavar="N", help="number of nodes (default: 1)")
    parser.add_argument("--log-level", default="WARNING", type=str.upper, choices=("DEBUG", "INFO", "WARNING", "ERROR"),
                        help="of the launcher and the scheduler (default: WARNING)")
    parser.add_argument("--log-file", metavar="FILE", help="append the log to FILE, too")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="a program and its arguments, passed on as they are")


def add_ssh_options(parser: argparse.ArgumentParser) -> None:
    """What launching over ssh takes besides."""
    group = parser.add_argument_group("over ssh")
    group.add_argument("-H", "--hosts", "--host-file", metavar="FILE", help="hosts, one a line: [user@]host[:port]; taken in turn")
    group.add_argument("-p", "--ssh-port", type=int, metavar="PORT", help="of hosts whose line names no port")
    group.add_argument("-i", "--identity", metavar="FILE", help="the private key for ssh")
    group.add_argument("--ssh-options", default="", metavar="WORDS", help="more options for ssh, in one argument: '-o Name=value -J host'")
    group.add_argument("--host", metavar="ADDRESS", help="address of this host where the scheduler listens "
                                                         "(default: DMLC_PS_ROOT_URI, or the one from which the hosts are reached)")
    group.add_argument("--sync-dir", "--sync-dst-dir", metavar="DIR",
                       help="copy the current folder to DIR on each host (rsync), and work there")
    group.add_argument("--remote-python", default=sys.executable or "python3", metavar="FILE",
                       help="a Python on the hosts that starts the nodes (default: the path of this one)")
    group.add_argument("--env", action="append", default=[], metavar="NAME[=VALUE]", help="hand this variable to the nodes, too")


def place_of(parser: argparse.ArgumentParser, options: argparse.Namespace):
    """Where the nodes are to run: None for this host, or an Ssh. Ends the program when the options are wrong."""
    from lapse.ssh import Ssh, read_hosts

    if options.hosts is None:
        for name in ("ssh_port", "identity", "ssh_options", "host", "sync_dir", "env"):
            if getattr(options, name):
                parser.error(f"--{name.replace('_', '-')} is for jobs over ssh: -H FILE names the hosts")
        return None
    if options.ssh_port is not None and not 1 <= options.ssh_port <= 65535:
        parser.error(f"-p {options.ssh_port}: a port is in [1, 65535]")
    environ = {}
    for entry in options.env:
        name, equals, value = entry.partition("=")
        if not name or (not equals and name not in os.environ):
            parser.error(f"--env {entry}: no such variable")
        environ[name] = value if equals else os.environ[name]
    try:
        words = shlex.split(options.ssh_options)
        hosts = read_hosts(options.hosts)
    except (LapseError, ValueError) as error:
        parser.error(str(error) if isinstance(error, LapseError) else f"--ssh-options: {error}")
    return Ssh(hosts, options.ssh_port, options.identity, words, options.host, options.sync_dir, options.remote_python, environ)


def run_with_options(parser: argparse.ArgumentParser, options: argparse.Namespace, place=None) -> int:
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        parser.error("no COMMAND given")
    if options.num_servers < 1:
        parser.error(f"-s {options.num_servers}: at least one node is needed")
    logger = logging.getLogger("lapse")
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    handlers[0].setFormatter(logging.Formatter("lapse: %(message)s"))
    if options.log_file:
        try:
            handlers.append(logging.FileHandler(options.log_file))
        except OSError as error:
            parser.error(f"--log-file {options.log_file}: {error.strerror}")
        handlers[1].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    level = logger.level
    logger.setLevel(options.log_level)
    for handler in handlers:
        logger.addHandler(handler)
    try:
        return run(command, options.num_servers, place=place)
    finally:
        logger.setLevel(level)
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()


if __name__ == "__main__":
    sys.exit(main())
