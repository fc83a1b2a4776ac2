"""One process of a job: `setup`, `scheduler`, and `Server`, from joining to leaving.

Design: `Server` is the user's handle. What lives as long as the node does is in `Node`, which knows its Server and its Workers by
weak references only, so that garbage collection in any order ends what is to end. Threads of a node: "lapse-server" (the van's
loop) and "lapse-marks", both without the GIL, "lapse-errands" (below), and the cluster's own.

Finalizers and signal handlers run at any instant in any thread, also inside of somebody's lock: they only put errands into a queue
(whose put is reentrant), and the errands thread does them. `lock` guards slots and retired; `ending` is held while the node ends.
"""
from __future__ import annotations

import atexit
import contextlib
import hashlib
import logging
import multiprocessing.util
import operator
import os
import queue
import signal
import sys
import threading
import time
import weakref

import numpy as np

from lapse import _van
from lapse._protocol import Protocol
from lapse._refill import Filler
from lapse.cluster import FRAME_BYTES, Cluster, Scheduler
from lapse.config import Config
from lapse.errors import Interrupted, LapseError, NodeFailure
from lapse.sampling import checked_sampling
from lapse.stats import JobStats, NodeStats, keys_to_trace
from lapse.worker import checked_keys, local_mask

__all__ = ["Server", "is_scheduler", "scheduler", "setup"]

log = logging.getLogger("lapse")
stats_log = logging.getLogger("lapse.stats")
trace_log = logging.getLogger("lapse.trace")

DTYPES = ("float32", "float64", "int32", "int64")
PROTOCOL_VERSION = 1
FRAME_SLACK = 4096              # bytes of a frame with one value that are not the value, generously
EXPLANATION = 3.0               # seconds until the cluster should know why messages cannot be sent
JOIN_THREADS = 10.0             # seconds for the node's own threads to end
MARKS = 1.0                     # seconds from one MARK to the next (_wire.pxd)
JOIN_ERRANDS = 1.0              # seconds for the thread of the errands, which may be in somebody's finalizer

_config: Config | None = None
_node: Node | None = None       # the last one of this process
_watching = False               # the main thread's end is watched
_kept_in_child: list = []       # nodes of the parent, never to be closed here


# --- before the Server ------------------------------------------------------------------------------------------------------

def setup(num_keys: int, num_threads: int, **settings) -> None:
    """Declare the key space of the job and the worker threads of this node; the first `Server` joins the job.

    Settings (keyword only) are those of docs/options.md, among them location_caches, transport, shared_memory, heartbeat, op_timeout,
    join_timeout, stats_out, trace_keys. ValueError for values out of range and for an environment that describes a cluster in
    part, TypeError for unknown settings, RuntimeError while a Server lives. Asynchronous; one thread; local.
    """
    global _config
    if _server_lives():
        raise RuntimeError("lapse.setup: this process has a Server; shut it down first")
    config = Config.make(_whole("num_keys", num_keys), _whole("num_threads", num_threads), **settings)
    if config.trace_keys:
        keys_to_trace(config.trace_keys, config.num_keys)
    _config = config


def is_scheduler() -> bool:
    """Tell whether this process is to run `scheduler` (DMLC_ROLE). Asynchronous; thread-safe; local."""
    return (_config or Config.make(1, 1)).role == "scheduler"


def scheduler(num_keys: int, num_threads: int, **settings):
    """Run the scheduler of the job; return when all nodes have left it.

    NodeFailure when the job failed. Blocking; one thread; collective with the Servers of all nodes.
    """
    setup(num_keys, num_threads, **settings)
    if _config.role != "scheduler":
        raise RuntimeError("lapse.scheduler: the environment does not make this process the scheduler (DMLC_ROLE)")
    failure = Scheduler(_config).run()
    if failure is not None:
        raise NodeFailure(*failure)


def _server_lives() -> bool:
    """Whether this process has a node; one whose Server was dropped is about to end, and waited for."""
    if _node is not None and _node.server is not None and _node.server() is None:
        _node.ended.wait(2 * JOIN_THREADS)
    return _node is not None and _node.active


def _whole(name: str, value) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, not {value!r}") from None


# --- lengths and types --------------------------------------------------------------------------------------------------------

def _dtype_name(dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        try:
            name = np.dtype(dtype).name
        except TypeError:
            name = ""
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    return name


def _lengths(name: str, value, num_keys: int) -> int | np.ndarray:
    """Numbers per key: an int, or a uint32 array of num_keys."""
    if hasattr(value, "__index__") and not getattr(value, "ndim", 0):
        lengths = np.array([operator.index(value)], dtype=object)
    else:
        value = value.detach().cpu().numpy() if hasattr(value, "detach") else value
        lengths = np.atleast_1d(np.asarray(value))
    if lengths.ndim != 1 or len(lengths) not in (1, num_keys):
        raise ValueError(f"{name} must have 1 or {num_keys} entries (num_keys), not shape {lengths.shape}")
    try:
        whole = np.array([operator.index(n) for n in lengths]) if lengths.dtype == object else lengths
        if whole.dtype.kind not in "iuf" or not (whole == np.floor(whole)).all():
            raise TypeError
    except TypeError:
        raise TypeError(f"{name} must be whole numbers") from None
    if whole.min() < 0 or whole.max() >= 2**32:
        raise ValueError(f"{name} must be in [0, 2**32)")
    if whole.min() == whole.max():
        return int(whole[0])
    return np.ascontiguousarray(whole, dtype=np.uint32)


def _describe(lengths: int | np.ndarray) -> str:
    """What every node of the job must agree on."""
    if isinstance(lengths, int):
        return str(lengths)
    return f"{int(lengths.sum(dtype=np.int64))} in total, sha256 {hashlib.sha256(lengths.astype('<u4').tobytes()).hexdigest()[:16]}"


# --- the node -----------------------------------------------------------------------------------------------------------------

class Node:
    """What Server and Workers share: the parts of this process, its worker slots, its end."""

    van_type = _van.Van             # lapse.testing.injecting puts another one here

    def __init__(self, config: Config, visible, stored, dtype: str):
        self.config = config
        self.failure = None
        self.failed = threading.Event()
        self.interrupted = False
        self.closed = False             # shut down or broken up: no call gets through any more
        self.forked = False
        self.ended = threading.Event()  # everything is closed
        self.van = None
        self.lock = threading.Lock()
        self.ending = threading.RLock() # (a signal handler may want to end what this thread is ending)
        self.is_ending = False
        self.slots: list = [None] * config.num_threads          # weak references to live Workers
        self.retired: set[int] = set()
        self.orphans: list = []                                 # Operations that outlived their Worker
        self.errands: queue.SimpleQueue = queue.SimpleQueue()
        self.rounds = 0                 # of job_stats
        self.server = None              # weak reference
        self.sampling = None            # lapse._sampling.Sampling, when it has been enabled
        self.filler = None              # of the pool, and its thread
        self.filler_thread = None
        self.marks_thread = None
        self.had_workers = False
        self.join(visible, stored, dtype)

    @property
    def active(self) -> bool:
        return not (self.closed or self.forked)

    # -- start

    def join(self, visible, stored, dtype):
        config = self.config
        description = {"num_keys": config.num_keys, "dtype": dtype, "lengths": _describe(visible),
                       "stored_lengths": _describe(stored), "location_caches": config.location_caches,
                       "protocol": PROTOCOL_VERSION}
        longest = int(np.max(stored)) * np.dtype(dtype).itemsize        # it travels in one frame, however long it is
        self.cluster = Cluster(config, description, self.on_failure, max_message=max(FRAME_BYTES, longest + FRAME_SLACK))
        self.rank, self.num_nodes = self.cluster.rank, self.cluster.num_nodes
        self.errands_thread = threading.Thread(target=self.run_errands, name="lapse-errands", daemon=True)
        self.errands_thread.start()
        try:
            self.protocol = Protocol(config.num_keys, self.rank, self.num_nodes, dtype=dtype, visible=visible, stored=stored,
                                     max_workers=config.num_threads + 1, location_caches=config.location_caches,
                                     shared_memory=config.shared_memory, credit_ops=config.credit_ops)
            if config.trace_keys:
                self.protocol.trace(keys_to_trace(config.trace_keys, config.num_keys))
            self.van = Node.van_type(self.protocol, self.cluster.pull, self.cluster.push, self.cluster.job_id, self.cluster.authenticated)
            self.thread = threading.Thread(target=self.serve, name="lapse-server", daemon=True)
            self.thread.start()
            if self.failure:
                self.van.fail(_van.ERR_FAILED)
            missing = self.van.greet(config.join_timeout) or self.van.wait_greetings(config.join_timeout)
            if missing and not self.failure:
                raise LapseError(f"no word from node {', '.join(map(str, missing))} on its data connection within "
                                 f"{config.join_timeout:g} s")
            for rank, descriptor in self.van.connections().items():
                self.cluster.heard(rank, descriptor)
            if self.num_nodes > 1:
                self.marks_thread = threading.Thread(target=self.van.send_marks, args=(MARKS,), name="lapse-marks", daemon=True)
                self.marks_thread.start()
            self.cluster.ready()
            self.catch_interrupts()
        except BaseException as error:
            self.break_up(f"could not start: {type(error).__name__}: {error}")
            raise

    def serve(self):
        self.van.run()
        violation = self.van.violation()
        if violation:
            by, what = violation
            log.error("node %d got from node %d: %s", self.rank, by, what)
            self.cluster.fail(f"broke the protocol: {what}", by if by >= 0 else None)
        elif self.van.state_code() == _van.ERR_FAILED and not self.failure:
            self.errands.put(("unexplained",))

    # -- failure

    def on_failure(self, failure):
        """The job is over; `failure` is why. Called once, by the cluster."""
        self.failure = failure
        if self.van is not None:
            self.van.fail(_van.ERR_FAILED)
        self.failed.set()
        if not self.closed:
            log.error("%s", NodeFailure(*failure))

    def error(self, code: int) -> Exception:
        """The exception for a code that concerns the whole node."""
        if code == _van.ERR_FORKED or self.forked:
            return RuntimeError("this object belongs to the parent process: a forked child cannot use it")
        if code == _van.ERR_INTERRUPTED or self.interrupted:
            return Interrupted("interrupted by Ctrl-C")
        if code == _van.ERR_STOPPED and not self.failure:
            return RuntimeError("the server has been shut down")
        self.failed.wait(JOIN_THREADS)      # the cause may be on its way
        return NodeFailure(*self.failure) if self.failure else LapseError("the job has failed")

    def check(self):
        """Raise what a call that does not go through the van would miss."""
        if self.forked:
            raise self.error(_van.ERR_FORKED)
        if self.failure or self.interrupted:
            raise self.error(_van.ERR_FAILED)
        if self.closed:
            raise self.error(_van.ERR_STOPPED)

    # -- Ctrl-C

    def catch_interrupts(self):
        if (threading.current_thread() is threading.main_thread()
                and signal.getsignal(signal.SIGINT) is signal.default_int_handler):
            signal.signal(signal.SIGINT, self.on_sigint)

    def on_sigint(self, signum, frame):
        if self.active:
            self.interrupted = True
            self.van.fail(_van.ERR_INTERRUPTED)
            self.errands.put(("fail", "interrupted"))
        signal.default_int_handler(signum, frame)

    def release_interrupts(self):
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) == self.on_sigint:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    # -- workers

    def member(self, index: int) -> str:
        return f"{self.rank}/{index}"

    def enter(self, worker) -> int:
        """A slot for a new Worker."""
        import gc
        self.check()
        for attempt in range(2):
            with self.lock:
                for index, slot in enumerate(self.slots):
                    if slot is None or slot() is None:
                        self.slots[index] = weakref.ref(worker)
                        self.had_workers = True
                        back = index in self.retired
                        self.retired.discard(index)
                        break
                else:
                    index = None
            if index is not None:
                if back:
                    self.cluster.enlist(self.member(index))
                return index
            if attempt == 0:
                gc.collect()            # Workers that only a cycle keeps
        raise ValueError(f"all {len(self.slots)} worker slots are taken (lapse.setup declared num_threads={len(self.slots)})")

    def leave(self, index: int):
        with self.lock:
            self.slots[index] = None

    def finalized(self, index: int, operations):
        if operations.purge():          # the job failed: what is under way may still be written to
            self.errands.put(("orphan", operations))
        self.leave(index)

    def dropped(self, index: int, operations):
        """A Worker is gone without finalize (a finalizer: any thread, any instant)."""
        if not self.forked:
            self.errands.put(("dropped", index, operations))

    def worker_barrier(self, index: int, timeout=None):
        self.check()
        self.meet("workers", self.member(index), timeout)

    def meet(self, group: str, member: str, timeout=None):
        if timeout is not None and not float(timeout) >= 0:
            raise ValueError(f"timeout must be a number of seconds, at least 0, not {timeout!r}")
        try:
            self.cluster.barrier(group, member, timeout)
        except NodeFailure:
            self.failed.wait(JOIN_THREADS)      # from here on every call of this node fails
            if self.interrupted:
                raise self.error(_van.ERR_INTERRUPTED) from None
            raise

    def reset_stats(self, index: int):
        """Statistics start anew; between two barriers of all workers, so that one of them does it."""
        with self.lock:
            first = next((i for i, slot in enumerate(self.slots) if slot is not None), index)
        if index == first:
            self.protocol.reset_counters()

    # -- sampling

    def enable_sampling(self, **settings):
        self.check()
        with self.lock:
            if self.sampling is not None:
                raise RuntimeError("sampling support has been enabled before")
            if self.had_workers:
                raise RuntimeError("sampling support has to be enabled before the first Worker")
            sampling = checked_sampling(self.protocol, self.config.num_keys, **settings)
            if sampling.pooled:
                # a worker slot behind those of the program
                filler = Filler(self.protocol, self.van, sampling, self.config.num_threads, self.config.credit_bytes)
                thread = threading.Thread(target=filler.run, name="lapse-sampling", daemon=True)
                thread.start()
                self.filler, self.filler_thread = filler, thread
            self.sampling = sampling                # when all has gone well: another try may do better

    def stop_sampling(self):
        """End the thread that fills the pool; what it has sent for has arrived then."""
        if self.filler is not None:
            self.filler.stop()
            self.filler_thread.join(JOIN_THREADS)
            if self.filler_thread.is_alive():
                log.error("node %d: the sampling thread does not end", self.rank)

    # -- errands

    def run_errands(self):
        while True:
            errand = None
            pause = 0.05 if self.orphans else 1.0 if self.config.trace_keys else None
            with contextlib.suppress(queue.Empty):
                errand = self.errands.get(timeout=pause)
            self.orphans = [operations for operations in self.orphans if operations.purge()]
            self.log_trace()
            if errand is None:
                continue
            kind, *what = errand
            errand = None
            if kind == "end":
                return
            try:
                if kind == "dropped":
                    index, operations = what
                    self.orphans.append(operations)
                    self.retire(index, operations)
                    operations = None
                elif kind == "orphan":
                    self.orphans += what
                elif kind == "fail":
                    self.cluster.fail(*what)
                elif kind == "unexplained":
                    # A broken connection is known to the cluster in a moment, with its cause; this node's own trouble is not.
                    if not self.failed.wait(EXPLANATION) and not self.closed:
                        self.cluster.fail("could not send a message, or had no memory for one")
                elif kind == "abandon":
                    self.abandon("its Server was dropped without shutdown")
                    return
            except Exception:
                log.exception("node %d: errand %s", self.rank, kind)
            what = None

    def retire(self, index: int, operations):
        with self.lock:
            slot = self.slots[index]
            taken = slot is not None and slot() is not None        # by a new Worker already
            if not taken:
                operations.let_go()
                self.slots[index] = None
                self.retired.add(index)
        if not taken and not self.closed:
            self.cluster.retire(self.member(index))

    def log_trace(self):
        if self.config.trace_keys and self.van is not None:
            for when, key, what, peer, epoch in self.protocol.drain_trace():
                trace_log.info("node %d: key %d %s, other node %d, epoch %d, at %.6f s", self.rank, key, what, peer, epoch, when / 1e9)

    # -- statistics

    def counters(self) -> dict:
        return {"protocol": self.protocol.counters(), "van": {**self.van.counters(), "refused": self.cluster.refused}}

    def gather_stats(self, name: str) -> JobStats:
        everybody = self.cluster.compare(name, self.counters())
        return JobStats(tuple(NodeStats.of(everybody[rank]["protocol"], everybody[rank]["van"])
                              for rank in range(self.num_nodes)))

    # -- end

    def shut_down(self):
        """The normal end, agreed on by all nodes."""
        with self.ending:
            if self.closed:
                return
            if self.is_ending:
                raise RuntimeError("this thread is in shutdown() already: called by a signal handler or a finalizer")
            try:
                self.is_ending = True
                self.end_together()
            finally:
                self.is_ending = False

    def end_together(self):
        """What shut_down does, once."""
        if self.interrupted:
            self.break_up("interrupted")
            return
        try:
            self.check()
            self.stop_sampling()
            self.finish_workers()
            self.meet("nodes", str(self.rank))
            problems = self.audit()
            job = self.gather_stats("stats")
            if self.rank == 0:
                self.report(job)
            self.cluster.expect_goodbyes()
            self.meet("nodes", str(self.rank))
            missing = self.van.say_goodbye() or self.van.wait_goodbyes(self.config.join_timeout)
            if missing:
                self.check()
                raise LapseError(f"no goodbye from node {', '.join(map(str, missing))}")
        except BaseException as error:
            self.break_up(f"could not shut down: {type(error).__name__}: {error}")
            raise
        self.closed = True
        try:
            self.van.fail(_van.ERR_STOPPED)
            self.stop_threads()
            self.cluster.leave()
        finally:                        # also when an interrupt comes
            self.close()
        if problems:
            raise LapseError(f"the audit at the end of the job found: {'; '.join(problems)}")

    def finish_workers(self):
        """Wait for the operations of Workers that were not finalized; none of this node's slots will come to a barrier again."""
        for index in range(len(self.slots)):
            self.cluster.retire(self.member(index))
        pause, end = 0.0005, time.monotonic() + (self.config.op_timeout or float("inf"))
        while self.protocol.open_operations():
            self.check()
            if time.monotonic() > end:
                raise LapseError(f"operations were still under way after {self.config.op_timeout:g} s")
            time.sleep(pause)
            pause = min(2 * pause, 0.05)

    def audit(self) -> list[str]:
        """Compare what homes and owners think; sentences about what does not match, the same on every node."""
        everybody = self.cluster.compare("audit", {**self.protocol.audit(), "leftovers": self.protocol.leftovers()})
        problems = []
        for home in range(self.num_nodes):
            for owner in range(self.num_nodes):
                thinks, has = everybody[home]["directory"][owner], everybody[owner]["rows"][home]
                if list(thinks) != list(has):
                    problems.append(f"node {home}'s directory and node {owner}'s parameters differ "
                                    f"({thinks[0]} and {has[0]} keys)")
        for rank in range(self.num_nodes):
            left = {name: count for name, count in everybody[rank]["leftovers"].items() if count}
            if left:
                problems.append(f"left over on node {rank}: {left}")
        return problems

    def report(self, job: JobStats):
        stats_log.info("statistics of the job\n%s", job.table())
        if self.config.stats_out:
            try:
                path = job.write(self.config.stats_out)
                stats_log.info("statistics are in %s", path)
            except OSError as error:
                log.error("statistics could not be written: %s", error)

    def break_up(self, cause: str):
        """End without the others' agreement: tell them, then close. Waits for nobody but the node's own threads."""
        self.closed = True
        try:
            if not self.failure:
                self.cluster.fail("interrupted" if self.interrupted else cause)
            if self.van is not None:
                self.van.fail(_van.ERR_INTERRUPTED if self.interrupted else _van.ERR_FAILED if self.failure else _van.ERR_STOPPED)
                self.stop_threads()
        finally:                        # an interrupt may come once more
            if self.van is not None:
                self.van.fail(_van.ERR_STOPPED)     # (the first code stays)
            self.close()

    def stop_threads(self):
        self.stop_sampling()
        self.van.stop()
        self.thread.join(JOIN_THREADS)
        if self.thread.is_alive():
            log.error("node %d: the server thread does not end", self.rank)
        if self.marks_thread is not None:
            self.marks_thread.join(JOIN_THREADS)

    def close(self):
        self.closed = True
        try:
            self.log_trace()
            self.errands.put(("end",))
            self.release_interrupts()
            if self.van is None or not (self.thread.is_alive() or (self.filler_thread and self.filler_thread.is_alive())):
                self.orphans = []       # nothing writes to them any more
                if self.van is not None:
                    self.van.close()    # a worker may be about to send
                self.cluster.close()
        finally:
            self.ended.set()

    def abandon(self, cause: str):
        """The end of a node that nobody shut down: quiet when it is the only one, else a failure of the job."""
        with self.ending:
            if self.active and not self.is_ending:      # (this thread would be in shutdown)
                if self.num_nodes > 1:
                    log.error("node %d: %s", self.rank, cause)
                self.break_up(cause)

    def after_fork(self):
        """In a forked child: this node is the parent's."""
        self.forked = True
        _kept_in_child.append(self)
        if self.van is not None:
            self.van.fail(_van.ERR_FORKED)


def _last_error() -> BaseException | None:
    """The exception that the main thread died of, if it did."""
    return getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)


def _after(error: BaseException | None) -> str:
    if error is None:
        return ""
    return f" after {type(error).__name__}" + (f": {error}" if str(error) else "")


@atexit.register
def _at_exit():
    if _node is not None and _node.active:
        _node.abandon(f"exited without shutdown{_after(_last_error())}")


def _at_end_of_child():
    """The end of a process that multiprocessing forked, where atexit does nothing. Threads come first, unless an error is on its way."""
    error = sys.exc_info()[1]
    if error is None:
        for thread in threading.enumerate():
            if not thread.daemon and thread is not threading.current_thread():
                thread.join()
    if _node is not None and _node.active:
        _node.abandon(f"exited without shutdown{_after(error)}")


def _watch_main_thread():
    """Python waits for all threads before atexit; when the main thread died of an exception, ours must not wait for the job."""
    threading.main_thread().join()
    if _last_error() is not None:
        _at_exit()


def _after_fork():
    global _node, _watching
    node, _node = _node, None
    _watching = False
    if node is not None and node.active:
        node.after_fork()


os.register_at_fork(after_in_child=_after_fork)


# --- the user's handle ---------------------------------------------------------------------------------------------------------

class Server:
    """This node's share of the job. Joins it, and returns when every node is up.

    `Server(num_keys, length)`, `Server(length)`: numbers per key, the same for all keys. `Server(lengths)`: array-like of 1 or
    num_keys whole numbers. num_keys must be that of `lapse.setup`. dtype: float32, float64, int32 or int64. stored_lengths: what the
    owner keeps per key (an int or per key), at least the length that pull returns.

    One at a time in a process, else RuntimeError; `with Server(...)` shuts it down. LapseError when the job cannot start.
    Blocking; one thread; collective over all nodes.
    """

    def __init__(self, *args, dtype="float32", stored_lengths=None):
        global _node, _watching
        if _config is None:
            raise RuntimeError("lapse.Server: call lapse.setup(num_keys, num_threads) first")
        if _config.role == "scheduler":
            raise RuntimeError("lapse.Server: this process is the scheduler (DMLC_ROLE); call lapse.scheduler")
        if not 1 <= len(args) <= 2:
            raise TypeError("Server(num_keys, length), Server(length) or Server(lengths)")
        num_keys = _config.num_keys
        if len(args) == 2 and _whole("num_keys", args[0]) != num_keys:
            raise ValueError(f"Server has num_keys {args[0]}, but lapse.setup declared {num_keys}")
        visible = _lengths("lengths", args[-1], num_keys)
        stored = visible if stored_lengths is None else _lengths("stored_lengths", stored_lengths, num_keys)
        if np.any(np.less(stored, visible)):
            raise ValueError("stored_lengths must be at least the lengths that pull returns")
        dtype = _dtype_name(dtype)
        if _server_lives():
            raise RuntimeError("this process has a Server already; shut it down first")
        _node = self._node = node = Node(_config, visible, stored, dtype)
        node.server = weakref.ref(self)
        finalizer = weakref.finalize(self, node.errands.put, ("abandon",))
        finalizer.atexit = False
        self._protocol, self._van, self._cluster = node.protocol, node.van, node.cluster
        self._dtype = np.dtype(dtype)
        if not _watching:
            _watching = True
            threading.Thread(target=_watch_main_thread, name="lapse-main-watch", daemon=True).start()
            if multiprocessing.parent_process() is not None:
                multiprocessing.util.Finalize(None, _at_end_of_child, exitpriority=0)

    def _error(self, code: int) -> Exception:
        return self._node.error(code)

    def _worker_barrier(self, index: int) -> None:
        self._node.worker_barrier(index)

    def enable_sampling_support(self, scheme="naive", with_replacement=True, distribution="uniform", min=0, max=None, *, seed=None,
                                group_size=250, reuse=1, postpone=False, batch_size=10000) -> None:
        """Let the Workers of this node sample keys of [min, max); max None: all keys from min on. Before the first of them, and once.

        scheme: naive, preloc, pool or local (= onlylocal). with_replacement: the draws of one sample may repeat. distribution: "uniform",
        "log-uniform" (key min + k with a share of ln(k + 2) - ln(k + 1)), an array of max - min weights, or a callable f(rng, n) -> array
        of n keys, which is called under the GIL for batch_size draws at once; rng is a numpy Generator of the worker's own. seed: makes a
        worker's draws the same in every run, but for where they depend on what is local. pool: group_size draws are localized at once, each
        is used `reuse` times; postpone moves a draw that is not local to the end of its sample.

        ValueError, TypeError or KeyRangeError for wrong settings, RuntimeError when it is too late. Asynchronous; one thread; local.
        """
        self._node.enable_sampling(scheme=scheme, with_replacement=with_replacement, distribution=distribution, low=min, high=max,
                                   seed=seed, group_size=group_size, reuse=reuse, postpone=postpone, batch_size=batch_size)

    @property
    def _sampling(self):
        return self._node.sampling

    def shutdown(self) -> None:
        """Leave the job when all nodes do: waits for the operations of this node's Workers, audits, closes. Idempotent.

        Workers that were not finalized are finished here. NodeFailure when the job has failed, LapseError when the audit finds a
        parameter that is not where it should be, RuntimeError in a signal handler that has interrupted this very call. Blocking; one
        thread; collective over all nodes.
        """
        if self._node.forked:
            self._node.check()
        self._node.shut_down()
        if self._node.errands_thread is not threading.current_thread():
            self._node.errands_thread.join(JOIN_ERRANDS)    # not in shut_down: an errand may wait for `ending`

    def barrier(self, timeout: float | None = None) -> None:
        """Wait until every node has come here (once per node). TimeoutError after `timeout` seconds.

        Blocking; one thread per node; collective over all nodes.
        """
        self._node.check()
        self._node.meet("nodes", str(self._node.rank), timeout)

    def my_rank(self) -> int:
        """Return the rank of this node, from 0. Asynchronous; thread-safe; local."""
        if self._node.forked:
            self._node.check()
        return self._node.rank

    @property
    def num_nodes(self) -> int:
        """The number of nodes of the job. Asynchronous; thread-safe; local."""
        return self._node.num_nodes

    @property
    def num_keys(self) -> int:
        """The number of keys of the job. Asynchronous; thread-safe; local."""
        return self._node.config.num_keys

    @property
    def dtype(self) -> np.dtype:
        """The number type of the values. Asynchronous; thread-safe; local."""
        return self._dtype

    def is_local(self, keys):
        """Tell which of `keys` are on this node at this instant, as a bool array. Asynchronous; thread-safe; local."""
        self._node.check()
        return local_mask(self._protocol, keys)

    def owner(self, keys):
        """Return the rank of the node that owns a key (an int), or those of an array of keys.

        Exact for keys that are here or whose home is here, else the best guess. Asynchronous; thread-safe; local.
        """
        self._node.check()
        if hasattr(keys, "__index__") and not getattr(keys, "ndim", 0):
            return self._protocol.owner(checked_keys(self._protocol, [operator.index(keys)])[0])
        keys = checked_keys(self._protocol, keys)
        return np.fromiter((self._protocol.owner(key) for key in keys), np.int32, len(keys))

    def stats(self) -> NodeStats:
        """Return what this node has done so far. Asynchronous; thread-safe; local."""
        if self._node.forked:
            self._node.check()
        counters = self._node.counters()
        return NodeStats.of(counters["protocol"], counters["van"])

    def job_stats(self) -> JobStats:
        """Return what all nodes have done so far. Blocking; one thread per node; collective over all nodes."""
        self._node.check()
        self._node.rounds += 1
        return self._node.gather_stats(f"stats {self._node.rounds}")

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind, value, traceback) -> None:
        if kind is None:
            self.shutdown()
        elif self._node.active:
            self._node.abandon(f"{kind.__name__}: {value}")

    def __repr__(self) -> str:
        node = self._node
        state = "of the parent process" if node.forked else "failed" if node.failure else "shut down" if node.closed else "up"
        return f"<Server, node {node.rank} of {node.num_nodes}, {state}>"
