"""The record of locks (tests/locks.py) is complete; and the tests of those locks whose loss nothing else notices (`make locks`)."""
import contextlib
import fcntl
import gc
import io
import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import lapse
from lapse import _van, ipc, program, sockets
from lapse.cluster import Cluster
from lapse.config import Config
from lapse.node import Node
from lapse.output import Output
from tests.locks import ROWS, Row, swap
from tools import locks

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 60           # seconds; without its lock a test may hang


# --- the record

def test_every_lock_has_a_row_and_every_row_a_test():
    assert locks.check() == []


def test_a_lock_without_a_row_is_seen(monkeypatch):
    monkeypatch.setattr(locks, "ROWS", [row for row in ROWS if row.name != "lock of the arena"])
    assert [line for line in locks.uncovered() if "pthread_mutex_lock(&slabs.lock)" in line]


def test_a_row_that_does_not_fit_is_seen(monkeypatch):
    wrong = Row(999, "wrong", "", "tests/unit/test_locks.py::test_of_nothing", [swap("lapse/_store.pyx", "no such line", "GONE")])
    monkeypatch.setattr(locks, "ROWS", [*ROWS, wrong])
    problems = locks.check()
    assert any("'no such line' is there 0 times" in problem for problem in problems)
    assert any("there is no test" in problem for problem in problems)


def test_the_page_has_the_table():
    page = (ROOT / "docs/testing.md").read_text(encoding="utf-8")
    assert locks.table() in page


# --- at C level

def test_the_first_cause_stays(serve):
    server = serve(4)
    kv = lapse.Worker(0, server)
    server._van.fail(_van.ERR_INTERRUPTED)
    server._van.fail(_van.ERR_FAILED)
    assert server._van.state_code() == _van.ERR_INTERRUPTED
    with pytest.raises(lapse.Interrupted):
        kv.pull([1])
    server._node.abandon("enough")
    kv = None


def test_nothing_is_written_after_an_error(serve):
    """A worker that is told of the end gets its arrays back: the server thread, in the middle of filling them, has to stop first."""
    cut = 0                 # times that the end came while arrays were being filled
    for _ in range(40):
        server = serve(20_000, num_keys=200, shared_memory=False)
        kv = lapse.Worker(0, server)
        keys = np.arange(200)
        kv.set(keys, np.ones((200, 20_000), np.float32))
        vals = [np.zeros((200, 20_000), np.float32) for _ in range(4)]
        stamps = [kv.pull(keys, array, True) for array in vals]
        server._van.fail(_van.ERR_INTERRUPTED)
        with contextlib.suppress(lapse.Interrupted):
            kv.wait(stamps[3])
        seen = [array[-1, -1] for array in vals]
        server._node.thread.join(PATIENCE)
        assert [array[-1, -1] for array in vals] == seen
        cut += not all(seen)
        server._node.abandon("enough")
        kv = server = None
        if cut == 10:
            break
    assert cut


def test_the_end_while_workers_use_the_own_channel(serve):
    for _ in range(4):
        server = serve(1000, threads=8, num_keys=1000, shared_memory=False)
        started = threading.Barrier(9)

        def work(index, server=server, started=started):
            kv = lapse.Worker(index, server)
            keys, ones = np.arange(1000), np.ones((1000, 1000), np.float32)
            started.wait(PATIENCE)
            with contextlib.suppress(lapse.LapseError, RuntimeError):
                while True:
                    kv.push(keys, ones, True)       # most of the time it copies, under the channel's lock

        threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
        for thread in threads:
            thread.start()
        started.wait(PATIENCE)
        time.sleep(0.05)
        server._node.abandon("enough")
        for thread in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()


def test_new_workers_while_the_node_fails(serve):
    server = serve(4, threads=100)
    workers = []

    def make():
        with contextlib.suppress(lapse.LapseError, RuntimeError):
            for index in range(100):
                workers.append(lapse.Worker(index, server))

    thread = threading.Thread(target=make)
    thread.start()
    while not workers and thread.is_alive():
        time.sleep(0)
    server._van.fail(_van.ERR_FAILED)
    thread.join(PATIENCE)
    assert not thread.is_alive() and workers
    with pytest.raises(lapse.LapseError):
        workers[-1].pull([1])
    server._node.abandon("enough")
    workers.clear()


def test_traced_keys_while_they_are_read(run_program):
    """Events are noted by the server thread and read by another one: each comes out once, in the order of its key's epochs."""
    run_program("""
        import threading
        import numpy as np, lapse
        lapse.setup(20, 1, trace_keys="all")
        server = lapse.Server(1)
        kv = lapse.Worker(0, server)
        events, going = [], True
        server._node.log_trace = lambda: None           # the errands thread leaves them to us
        def read():
            while going:
                events.extend(server._protocol.drain_trace())
        thread = threading.Thread(target=read)
        thread.start()
        rng = np.random.default_rng(server.my_rank())
        for _ in range(1500):
            kv.localize(rng.integers(0, 20, 4))
        kv.barrier()
        going = False
        thread.join()
        events.extend(server._protocol.drain_trace())
        stats = server._node.counters()["protocol"]
        came = [event for event in events if event[2] == "arrived"]
        assert len(came) == stats["relocated_in"], (len(came), stats)
        assert len(events) - len(came) == stats["relocated_out"], (len(events), stats)
        for key in range(20):
            epochs = [event[4] for event in events if event[1] == key]
            assert epochs == sorted(epochs), (key, epochs)
        kv.finalize()
        server.shutdown()
        """, nodes=2)


# --- in Python

@contextlib.contextmanager
def slowly(*codes, pause=0.0005):
    """In threads that are started meanwhile, every step of these functions gives the others time: what their locks keep together comes
    apart without them."""
    codes = {getattr(code, "__code__", code) for code in codes}

    def trace(frame, event, arg):
        if frame.f_code not in codes:
            return None
        frame.f_trace_opcodes = True
        return step

    def step(frame, event, arg):
        if event == "opcode":
            time.sleep(pause)
        return step

    threading.settrace(trace)
    try:
        yield
    finally:
        threading.settrace(None)


def at_once(*calls):
    """Run them in threads; their results, or what they raised."""
    results = [None] * len(calls)
    started = threading.Barrier(len(calls))

    def run(i, call):
        started.wait(PATIENCE)
        try:
            results[i] = call()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i, call), daemon=True) for i, call in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "a thread hangs"
    return results


def test_new_workers_get_different_slots(serve):
    server = serve(4, threads=3)
    with slowly(Node.enter):
        workers = at_once(*[lambda: lapse.Worker(0, server)] * 3)
    assert sorted(kv.index for kv in workers) == [0, 1, 2]
    workers = None


def test_a_node_ends_once(serve):
    server = serve(4)
    with slowly(Node.shut_down):
        assert at_once(*[server.shutdown] * 3) == [None] * 3
    assert not server._node.failure


def test_the_next_life_waits_for_the_end_of_the_last():
    lapse.setup(10, 1)
    with slowly(Node.abandon, Node.break_up, Node.close):
        server = lapse.Server(4)
    del server                      # dropped: another thread ends it
    gc.collect()
    lapse.setup(10, 1)
    lapse.Server(4).shutdown()


def test_a_failure_is_told_once():
    failures = []
    cluster = Cluster(Config.make(10, 2, environ={}), {"num_keys": 10}, failures.append)
    with slowly(Cluster.fail):
        at_once(*[lambda: cluster.fail("broken")] * 3)
    cluster.close()
    assert [failure.cause for failure in failures] == ["broken"]


def test_a_waker_that_is_closed_writes_to_nobody():
    """The number of its pipe may be another file's by then."""
    for delay in np.linspace(0.02, 0.12, 9):        # one of them is between the question whether it is closed, and the write
        waker = sockets.Waker()
        with slowly(sockets.Waker.wake, pause=0.005):
            thread = threading.Thread(target=waker.wake)
            thread.start()
            time.sleep(delay)
        waker.close()
        pipes = [os.pipe() for _ in range(4)]
        thread.join(PATIENCE)
        for read, write in pipes:
            os.set_blocking(read, False)
            with pytest.raises(BlockingIOError):
                os.read(read, 10)
            os.close(read)
            os.close(write)


def test_a_waker_wakes_in_the_middle_of_waking():
    """As a signal handler does."""
    waker = sockets.Waker()
    again = [True]

    def handler(frame, event, arg):
        if again and frame.f_code is sockets.Waker.wake.__code__ and event == "line" and frame.f_lineno == last:
            again.clear()
            waker.wake()
        return handler

    last = max(line for *_, line in sockets.Waker.wake.__code__.co_lines() if line)

    def wake():
        sys.settrace(handler)
        waker.wake()
        sys.settrace(None)

    assert at_once(wake) == [None] and not again
    waker.close()


def test_an_errand_may_come_while_one_is_put(serve):
    """A finalizer runs at any instant: also inside of the queue, in the same thread."""
    server = serve(4)
    node = server._node

    def drop(frame, event, arg):
        if frame.f_code is queue.Queue.put.__code__ and event == "line" and frame.f_lineno == last and kept:
            kept.clear()
            gc.collect()
        return drop

    kept = [lapse.Worker(0, server)]
    last = max(line for *_, line in queue.Queue.put.__code__.co_lines() if line)

    def put():
        sys.settrace(drop)
        node.errands.put(("nothing",))
        kept.clear()
        sys.settrace(None)

    at_once(put)
    lapse.Worker(0, server).finalize()      # in the slot that is free again


def test_workers_that_end_at_the_same_time_are_all_counted():
    inner = next(code for code in program.run_workers.__code__.co_consts if getattr(code, "co_name", "") == "run")
    meet = threading.Barrier(6)

    def work(index):
        meet.wait(PATIENCE)
        return index

    def run():
        with slowly(inner):
            return program.run_workers(6, work)

    assert at_once(run) == [list(range(6))]


def test_what_waits_to_be_written_is_counted():
    written = io.BytesIO()
    with slowly(Output.put, Output._run, pause=0.0001):
        output = Output(lambda: None)
        at_once(*[lambda: [output.put(written, b"abc") for _ in range(10)]] * 3)
    assert at_once(lambda: output.close(lambda: False)) == [None]       # until nothing waits
    assert written.getvalue() == b"abc" * 30
    assert output._size == 0


def test_the_cause_of_a_failure_is_waited_for(run_program):
    """Messages cannot be sent some time before the cluster knows why: whoever is told so gets the cause all the same."""
    done = run_program("""
        import os, signal, threading, time
        import numpy as np, lapse
        lapse.setup(100, 1)
        server = lapse.Server(1000)
        kv = lapse.Worker(0, server)
        kv.barrier()
        if server.my_rank() == 1:
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGKILL)
        told = type(server._node).on_failure
        def late(failure):
            time.sleep(0.5)             # the verdict takes its time
            told(server._node, failure)
        server._node.cluster._on_failure = late
        try:
            server._node.thread.join(0.4)
            server._van.fail(CODE)
            kv.pull([99])
        except Exception as error:
            print("caught", type(error).__name__, error)
        """.replace("CODE", str(int(_van.ERR_FAILED))), nodes=2, check=None)
    assert "caught NodeFailure node 1" in done.stdout, done.stdout + done.stderr


def test_who_sweeps_waits_for_the_owner(tmp_path):
    folder = tmp_path / "sockets"
    folder.mkdir()
    with (folder / "lock").open("w") as owner:
        fcntl.flock(owner, fcntl.LOCK_EX)
        process = subprocess.Popen([sys.executable, "-I", "-S", ROOT / "lapse/_sweep.py", folder])
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2)
        assert folder.is_dir()
    assert process.wait(PATIENCE) == 0
    assert not folder.exists()


def test_a_folder_is_its_owners_over_there(tmp_path, monkeypatch):
    """What the guard of a node makes on another host is not swept while it lives."""
    base = Path("/tmp") / f"t-{os.getpid()}"
    base.mkdir()
    try:
        script = "import sys; from lapse import _remote; print(_remote.make_folder(), flush=True); sys.stdin.read()"
        process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                   env={**os.environ, "TMPDIR": str(base), "PYTHONPATH": str(ROOT)})
        path = Path(process.stdout.readline().strip())
        assert path.parent == base and path.is_dir()
        ipc._remove_left(base)
        assert path.is_dir()
        process.stdin.close()
        assert process.wait(PATIENCE) == 0
        ipc._remove_left(base)
        assert not path.exists()
        process.stdout.close()
    finally:
        subprocess.run(["rm", "-rf", str(base)], check=True)
