"""setup, Server and what surrounds it: forms, life cycle, statistics, fork, Ctrl-C, and ends that nobody asked for."""
import json
import logging
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

import lapse
from lapse.stats import Accesses, keys_to_trace


def ones(n, length):
    return np.ones((n, length), np.float32)


# --- setup

def test_server_without_setup(run_program):
    run_program("""
        import lapse
        for call in (lambda: lapse.Server(3), lambda: lapse.Server(10, 3)):
            try:
                call()
            except RuntimeError as error:
                assert "lapse.setup" in str(error)
            else:
                raise AssertionError
        """)


@pytest.mark.parametrize("arguments", [(0, 1), (-5, 1), (10, 0), (2**63, 1)])
def test_setup_out_of_range(arguments):
    with pytest.raises(ValueError, match=r"num_keys|num_threads"):
        lapse.setup(*arguments)


@pytest.mark.parametrize("num_keys", [2**61 + 1, 2**63 - 1, 2**50])
def test_more_keys_than_memory(num_keys):
    lapse.setup(num_keys, 1)
    with pytest.raises(MemoryError, match=str(num_keys)):
        lapse.Server(1)


def test_setup_of_wrong_type():
    for arguments in (("10", 1), (10.0, 1), (10, None)):
        with pytest.raises(TypeError):
            lapse.setup(*arguments)
    with pytest.raises(TypeError, match="locaton_caches"):
        lapse.setup(10, 1, locaton_caches=True)
    with pytest.raises(ValueError, match="trace_keys"):
        lapse.setup(10, 1, trace_keys="everything")


def test_numpy_numbers_as_sizes(serve):
    server = serve(np.int64(3), num_keys=np.int32(7))
    assert server.num_keys == 7


def test_setup_while_a_server_lives(serve):
    serve()
    with pytest.raises(RuntimeError, match="shut it down first"):
        lapse.setup(10, 1)


def test_cluster_in_part(monkeypatch):
    monkeypatch.setenv("DMLC_ROLE", "server")
    monkeypatch.setenv("DMLC_NUM_SERVER", "2")
    with pytest.raises(ValueError, match=r"DMLC_PS_ROOT_URI.*DMLC_PS_ROOT_PORT"):
        lapse.setup(10, 1)


def test_scheduler_that_is_none(serve):
    serve().shutdown()
    assert not lapse.is_scheduler()
    with pytest.raises(RuntimeError, match="DMLC_ROLE"):
        lapse.scheduler(10, 1)


# --- the forms of Server

@pytest.mark.parametrize("arguments", [(5, 3), (3,), ([3],), ([3] * 5,), (np.full(5, 3),), ((3,),), (np.array([3.0]),), (5, [3] * 5)])
def test_uniform_lengths(serve, arguments):
    lapse.setup(5, 1)
    server = lapse.Server(*arguments)
    with lapse.Worker(0, server) as kv:
        assert kv.get_key_size(4) == 3
        assert kv.pull([4]).shape == (1, 3)
    server.shutdown()


@pytest.mark.parametrize("lengths", [[1, 2, 3], np.array([1, 2, 3], np.int16), np.array([1.0, 2.0, 3.0]), (1, 2, 3), range(1, 4)])
def test_own_lengths(serve, lengths):
    server = serve(lengths, num_keys=3)
    with lapse.Worker(0, server) as kv:
        assert [kv.get_key_size(key) for key in range(3)] == [1, 2, 3]


@pytest.mark.parametrize("dtype", ["uint8", "int64", "float32"])
def test_lengths_as_tensors(serve, dtype):
    torch = pytest.importorskip("torch")
    server = serve(torch.tensor([1, 2, 3], dtype=getattr(torch, dtype)), num_keys=3)
    with lapse.Worker(0, server) as kv:
        assert [kv.get_key_size(key) for key in range(3)] == [1, 2, 3]


@pytest.mark.parametrize(("arguments", "what"), [
    ((4, 3), "num_keys 4, but lapse.setup declared 5"),
    (([1, 2],), "1 or 5 entries"), (([[1] * 5],), "1 or 5 entries"), (([],), "1 or 5 entries"),
    ((-1,), r"must be in \[0"), (([1, 2, -3, 4, 5],), r"must be in \[0"), ((2**32,), r"must be in \[0"),
])
def test_wrong_lengths(serve, arguments, what):
    lapse.setup(5, 1)
    with pytest.raises(ValueError, match=what):
        lapse.Server(*arguments)


@pytest.mark.parametrize("arguments", [(), (1, 2, 3), ("3",), ([1.5],), (None,), (["a"] * 5,), ({},)])
def test_lengths_of_wrong_type(serve, arguments):
    lapse.setup(5, 1)
    with pytest.raises((TypeError, ValueError)):
        lapse.Server(*arguments)
    assert lapse.node._node is None or not lapse.node._node.active


def test_stored_lengths(serve):
    lapse.setup(5, 1)
    with pytest.raises(ValueError, match="stored_lengths must be at least"):
        lapse.Server(3, stored_lengths=2)
    with pytest.raises(ValueError, match="stored_lengths must be at least"):
        lapse.Server([1, 2, 3, 4, 5], stored_lengths=4)
    for stored in (8, [5, 6, 7, 8, 9]):
        with lapse.Server([1, 2, 3, 4, 5], stored_lengths=stored) as server, lapse.Worker(0, server) as kv:
            kv.push(range(5), np.ones(15, np.float32))
            assert kv.get_key_size(4) == 5
            assert kv.pull(range(5)).sum() == 15


@pytest.mark.parametrize("dtype", ["float64", np.float64, np.dtype("f8"), float, "f8"])
def test_spellings_of_dtype(serve, dtype):
    server = serve(2, dtype=dtype)
    assert server.dtype == np.float64
    with lapse.Worker(0, server) as kv:
        assert kv.pull([1]).dtype == np.float64


def test_dtype_of_torch(serve):
    torch = pytest.importorskip("torch")
    assert serve(2, dtype=torch.int32).dtype == np.int32


@pytest.mark.parametrize("dtype", ["float16", "uint8", "complex64", "nonsense", object, 7])
def test_wrong_dtype(serve, dtype):
    lapse.setup(5, 1)
    with pytest.raises(ValueError, match="dtype must be one of float32, float64, int32, int64"):
        lapse.Server(2, dtype=dtype)


# --- life

def test_second_server(serve):
    server = serve()
    with pytest.raises(RuntimeError, match="has a Server already"):
        lapse.Server(4)
    assert server.my_rank() == 0
    server.shutdown()
    server.shutdown()
    lapse.Server(4).shutdown()


def test_facts(serve):
    server = serve(4, num_keys=12)
    assert (server.my_rank(), server.num_nodes, server.num_keys, server.dtype) == (0, 1, 12, np.float32)
    assert server.is_local([1, 11]).tolist() == [True, True]
    assert server.owner(3) == 0
    assert server.owner([1, 2, 3]).tolist() == [0, 0, 0]
    assert server.owner(np.empty(0, np.int64)).tolist() == []
    server.barrier()
    assert "node 0 of 1, up" in repr(server)
    server.shutdown()
    assert "shut down" in repr(server)


def test_shutdown_in_a_handler_that_interrupts_shutdown(run_program):
    """The call inside cannot wait for the one that it has interrupted: it says so, and that is the end of both."""
    done = run_program("""
        import signal, time
        import lapse

        lapse.setup(10, 1)
        server = lapse.Server(1)
        if server.my_rank() == 0:
            signal.signal(signal.SIGALRM, lambda number, frame: server.shutdown())
            signal.setitimer(signal.ITIMER_REAL, 0.3)
        else:
            time.sleep(60)
        server.shutdown()
    """, nodes=2, check=1)
    assert "could not shut down: RuntimeError: this thread is in shutdown() already" in done.stderr, done.stderr


def test_shutdown_finishes_what_is_under_way(serve):
    server = serve(4, num_keys=1000, shared_memory=False)
    kv = lapse.Worker(0, server)
    out = np.zeros((1000, 4), np.float32)
    for _ in range(20):
        kv.push(range(1000), ones(1000, 4), True)
    kv.pull(range(1000), out, True)
    server.shutdown()
    assert (out == 20).all()


def test_marks_come_whoever_holds_the_gil_and_are_not_counted(run_program):
    """One a millisecond, also while the node ends."""
    run_program("""
        import ctypes
        import lapse, lapse.node
        lapse.node.MARKS = 0.001
        lapse.setup(8, 1)
        server = lapse.Server(1)
        kv = lapse.Worker(0, server)
        kv.barrier()
        van, other = server._node.van, 1 - server.my_rank()
        before, number = van.counters(), van.last_number(other)
        ctypes.PyDLL(None).usleep(2_000_000)
        assert van.last_number(other) > number
        assert van.counters() == before, (before, van.counters())
        kv.barrier()
        kv.finalize()
        server.shutdown()
        assert van.counters()["sent_messages"] == before["sent_messages"] + 1     # GOODBYE
    """, nodes=2)


def test_audit_finds_what_is_lost(serve, monkeypatch):
    server = serve()
    compare = server._cluster.compare
    lost = {"directory": [[1, 2]], "rows": [[0, 0]], "leftovers": {"coming": 3, "operations": 0}}
    monkeypatch.setattr(server._cluster, "compare", lambda name, data: {0: lost} if name == "audit" else compare(name, data))
    with pytest.raises(lapse.LapseError, match=r"directory and node 0's parameters differ \(1 and 0 keys\); left over .*'coming': 3"):
        server.shutdown()


def test_server_as_context(serve):
    lapse.setup(10, 1)
    with pytest.raises(ZeroDivisionError), lapse.Server(4) as server:
        kv = lapse.Worker(0, server)
        raise ZeroDivisionError
    with pytest.raises(RuntimeError):
        kv.pull([1])
    with lapse.Server(4) as server:
        server.barrier()


def test_many_lives(serve):
    threads = threading.active_count()
    for i in range(30):
        server = serve(4, threads=2)
        kv = lapse.Worker(0, server)
        kv.push([i], ones(1, 4))
        del kv
        server.shutdown()
    assert threading.active_count() <= threads + 2


# --- several nodes

def test_relocation_between_two_nodes(run_program):
    done = run_program("""
        import logging, threading
        import numpy as np, lapse
        logging.basicConfig(level=logging.INFO, format="%(name)s %(message)s")
        lapse.setup(10, 2, stats_out="out", trace_keys="1,9")
        server = lapse.Server(3)
        rank = server.my_rank()
        assert server.num_nodes == 2
        assert server.is_local([1, 9]).tolist() == [rank == 0, rank == 1]
        def work(index):
            kv = lapse.Worker(index, server)
            kv.begin_setup(); kv.end_setup()
            kv.push([1, 9], np.ones((2, 3), np.float32))
            kv.waitall(); kv.barrier()
            assert kv.pull([1, 9]).tolist() == [[4] * 3] * 2
            kv.barrier()
            if rank == 0 and index == 1:
                kv.localize([9])
                assert kv.is_local(9) and kv.pull_if_local([9])[0, 0] == 4
                assert server.owner(9) == 0 and server.is_local([9])[0]
            if rank == 1 and index == 0:
                out = np.zeros(3, np.float32)
                stamp = kv.pull([1], out, True)
                kv.wait(stamp)
                assert out[0] == 4 and len(kv.buffers) == 0
            kv.barrier()
            if rank == 1:
                assert server.owner(9) == 0 and not kv.is_local(9) and kv.pull_if_local([9]) is None
            kv.finalize()
        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        job = server.job_stats()
        assert len(job.nodes) == 2 and job.total.relocated_in == job.total.relocated_out == 1
        assert job.nodes[0].relocated_in == 1
        assert server.stats().pushed.total == 4
        server.shutdown()
        """, nodes=2)
    assert "Traceback" not in done.stderr, done.stderr
    assert "lapse.stats statistics of the job" in done.stderr + done.stdout
    assert "lapse.trace" in done.stderr + done.stdout


def test_more_nodes_than_keys(run_program):
    run_program("""
        import numpy as np, lapse
        lapse.setup(2, 1)
        server = lapse.Server(3)
        kv = lapse.Worker(0, server)
        kv.push([0, 1], np.ones((2, 3), np.float32))
        kv.localize([1])
        kv.barrier()
        assert (kv.pull([0, 1]) == 4).all()
        kv.finalize()
        server.shutdown()
        """, nodes=4)


def test_nodes_that_differ(run_program):
    for setting in ("lapse.setup(10 + rank, 1); lapse.Server(3)", "lapse.setup(10, 1); lapse.Server(3 + rank)",
                    "lapse.setup(10, 1); lapse.Server(3, dtype=['float32', 'float64'][rank])",
                    "lapse.setup(10, 1); lapse.Server(3, stored_lengths=3 + rank)",
                    "lapse.setup(10, 1); lapse.Server([1 + rank] * 9 + [5])"):
        done = run_program(f"""
            import os, lapse
            rank = int(os.environ["LAPSE_RANK"])
            try:
                {setting}
            except lapse.LapseError as error:
                print("refused:", error)
            """, nodes=2, check=None)
        assert len(re.findall("refused: the nodes differ in ", done.stdout)) == 2, done.stdout + done.stderr


@pytest.mark.parametrize(("end", "why"), [("pass", ""), ("raise KeyError('oops')", " after KeyError: 'oops'"), ("sys.exit(3)", ""),
                                          ("raise RuntimeError", " after RuntimeError")])
def test_exit_without_shutdown(run_program, end, why):
    """The others are told, and nobody hangs, not even threads that wait."""
    done = run_program(f"""
        import sys, threading
        import lapse
        lapse.setup(10, 2)
        server = lapse.Server(3)
        if server.my_rank() == 1:
            kv = lapse.Worker(0, server)
            {end}
        else:
            kv = lapse.Worker(0, server)
            try:
                kv.barrier()
            except lapse.NodeFailure as error:
                print("caught", error)
                raise
        """, nodes=2, check=None)
    assert done.returncode != 0
    assert re.search(rf"caught node 1 \(.*\): exited without shutdown{why}(;.*)?$", done.stdout, re.MULTILINE), done.stdout + done.stderr


def test_end_while_threads_send(run_program):
    """The node ends by its main thread's exception; workers in the middle of long calls get the failure, and touch no closed socket."""
    done = run_program("""
        import sys, threading, time
        import numpy as np, lapse
        lapse.setup(200000, 3)
        server = lapse.Server(100)
        ended = []
        first = threading.Semaphore(0)

        def work():
            kv = lapse.Worker(0, server)
            keys = np.arange(100000, 150000)
            vals = np.ones((50000, 100), np.float32)
            try:
                kv.push(keys, vals)
                first.release()
                while True:
                    kv.push(keys, vals, True)
            except (lapse.NodeFailure, lapse.LapseError, RuntimeError) as error:
                ended.append(error)
                first.release()

        if server.my_rank() == 0:
            threads = [threading.Thread(target=work) for _ in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                first.acquire()
            try:
                with server:
                    raise KeyError("enough")
            except KeyError:
                pass
            for thread in threads:
                thread.join()
            assert len(ended) == 3, ended
            print("ended")
            sys.exit(7)
        else:
            kv = lapse.Worker(0, server)
            try:
                kv.barrier()
            except lapse.NodeFailure as error:
                print("caught", error)
                sys.exit(8)
        """, nodes=2, check=None)
    assert "ended" in done.stdout, done.stdout + done.stderr
    assert re.search(r"caught node 0 \(.*\): KeyError: 'enough'", done.stdout), done.stdout + done.stderr


def test_node_that_cannot_send(run_program):
    """A node whose operations fail for a reason of its own says so; nobody waits for it."""
    done = run_program("""
        import lapse
        from lapse import _van
        lapse.setup(10, 1)
        server = lapse.Server(3)
        kv = lapse.Worker(0, server)
        kv.barrier()
        try:
            if server.my_rank() == 1:
                server._van.fail(_van.ERR_FAILED)   # as after an operation that found no memory
                kv.pull([1])
            else:
                kv.barrier()
        except lapse.NodeFailure as error:
            print("caught", error)
            raise
        """, nodes=2, check=None)
    assert len(re.findall(r"caught node 1 \(.*\): could not send a message", done.stdout)) == 2, done.stdout + done.stderr


def test_dies_by_an_exception_while_threads_wait(run_program):
    done = run_program("""
        import threading
        import lapse
        lapse.setup(10, 2)
        server = lapse.Server(3)
        kv = lapse.Worker(0, server)
        thread = threading.Thread(target=kv.barrier)
        thread.start()
        if server.my_rank() == 1:
            raise KeyError("oops")
        thread.join()
        server.shutdown()
        """, nodes=2, check=None)
    assert done.returncode != 0
    assert "oops" in done.stderr + done.stdout


def test_dropped_server_of_a_cluster(run_program):
    done = run_program("""
        import gc, time
        import lapse
        lapse.setup(10, 1)
        server = lapse.Server(3)
        if server.my_rank() == 1:
            del server
            gc.collect()
            time.sleep(30)
        kv = lapse.Worker(0, server)
        try:
            kv.barrier()
        except lapse.NodeFailure as error:
            print("caught", error)
        """, nodes=2, check=None)
    assert "dropped without shutdown" in done.stdout, done.stdout + done.stderr


def test_embedded_program_that_just_ends(run_program):
    done = run_program("""
        import lapse
        lapse.setup(10, 1)
        server = lapse.Server(3)
        kv = lapse.Worker(0, server)
        kv.pull([1])
        """)
    assert done.stderr == ""


# --- fork

def test_fork(run_program):
    run_program("""
        import os, sys
        import numpy as np, lapse
        lapse.setup(10, 2)
        server = lapse.Server(3)
        kv = lapse.Worker(0, server)
        kv.push([1], np.ones(3, np.float32))
        child = os.fork()
        if child == 0:
            code = 0
            for call in (lambda: kv.pull([1]), lambda: kv.push([1], np.ones(3, np.float32)), lambda: kv.localize([1], True),
                         lambda: kv.wait(0), kv.waitall, kv.barrier, kv.finalize, lambda: kv.num_keys, kv.get_key_size,
                         kv.reset_stats, lambda: kv.is_local(1), lambda: kv.pull_if_local([1]), lambda: lapse.Worker(1, server),
                         server.barrier, server.shutdown, server.stats, lambda: server.owner(1), lambda: server.is_local([1]),
                         server.job_stats, server.my_rank):
                try:
                    call()
                except RuntimeError as error:
                    if "parent process" not in str(error):
                        print(error); code = 1
                else:
                    print("no error", call); code = 2
            lapse.setup(5, 1)                   # a life of its own
            own = lapse.Server(2)
            mine = lapse.Worker(0, own)
            mine.push([1], np.ones(2, np.float32))
            mine.finalize()
            own.shutdown()
            del kv, server                      # closes nothing of the parent's
            sys.stdout.flush()
            sys.exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert kv.pull([1]).tolist() == [[1] * 3]
        del kv
        server.shutdown()
        """)


# --- Ctrl-C

INTERRUPTED = """
    import signal, sys, threading
    import numpy as np, lapse
    lapse.setup(10, 2)
    server = lapse.Server(3)
    seen = []
    ready, done = threading.Event(), threading.Event()

    def work():
        kv = lapse.Worker(0, server)
        ready.set()
        try:
            {wait}
        except lapse.Interrupted as error:
            seen.append(error)
        try:
            kv.pull([1])
        except lapse.Interrupted as error:
            seen.append(error)
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    ready.wait()
    print("ready", flush=True)
    try:
        {main}
    except KeyboardInterrupt:
        done.wait(30)
        server.shutdown()
        assert len(seen) == 2, seen
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        print("interrupted", flush=True)
        sys.exit(42)
    """


@pytest.mark.parametrize("main", [
    "done.wait()", "other = lapse.Worker(1, server); other.finalize()"])
def test_ctrl_c(tmp_path, main):
    """KeyboardInterrupt in the main thread, Interrupted in the others."""
    wait = "kv.barrier()" if "done" in main else "[kv.pull([1]) for _ in iter(int, 1)]"
    path = tmp_path / "program.py"
    path.write_text(textwrap.dedent(INTERRUPTED.format(wait=wait, main=main)))
    environment = {**{name: value for name, value in os.environ.items() if not name.startswith(("DMLC_", "LAPSE_"))},
                   "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env=environment) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.3)                     # most likely inside of the call; right without it, too
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 42, out + err
    assert "interrupted" in out


def test_own_sigint_handler_stays(serve):
    before = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        server = serve()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        server.shutdown()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        server = serve()
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        server.shutdown()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


# --- statistics

def test_statistics(serve, caplog, tmp_path):
    server = serve(4, stats_out=str(tmp_path / "new" / "stats"), threads=2)
    kv = lapse.Worker(0, server)
    kv.push(range(10), ones(10, 4))
    kv.pull(range(5))
    kv.set([1], ones(1, 4))
    kv.localize([1, 2])
    stats = server.stats()
    assert (stats.pushed, stats.pulled, stats.set, stats.localized) == (Accesses(10), Accesses(5), Accesses(1), Accesses(2))
    assert stats.pulled.total == 5
    assert stats.pulled.local_share == 1.0
    assert stats.workers[0].pushed.local == 10
    assert server.job_stats().total.pushed.local == 10
    del kv
    with caplog.at_level(logging.INFO, "lapse.stats"):
        server.shutdown()
    table = next(record.message for record in caplog.records if record.name == "lapse.stats" and "pulled" in record.message)
    assert re.search(r"^ *0 +5 +100.0%", table, re.MULTILINE)
    assert [path.name for path in (tmp_path / "new" / "stats").iterdir()] == ["stats.json"]
    written = json.loads((tmp_path / "new" / "stats" / "stats.json").read_text())
    assert written["job"]["pushed"]["local"] == 10
    assert len(written["nodes"]) == 1
    assert server.stats().pushed.total == 10        # also after shutdown


def test_statistics_that_cannot_be_written(serve, caplog, tmp_path):
    (tmp_path / "file").write_text("")
    serve(4, stats_out=str(tmp_path / "file")).shutdown()
    assert "could not be written" in caplog.text


def test_keys_to_trace():
    assert keys_to_trace("12,3421", 5000) == [12, 3421]
    assert keys_to_trace("all", 3) == range(3)
    drawn = keys_to_trace("random-10-seed-7-range-0-100", 100)
    assert len(set(drawn)) == 10
    assert drawn == keys_to_trace("random-10-seed-7-range-0-100", 100) != keys_to_trace("random-10-seed-8-range-0-100", 100)
    for wrong in ("", "x", "1,", "random-10", "random-a-seed-7-range-0-100", "1;2"):
        with pytest.raises(ValueError, match=r"trace_keys|invalid literal"):
            keys_to_trace(wrong, 100)
    with pytest.raises(lapse.KeyRangeError):
        keys_to_trace("5,100", 100)
    with pytest.raises(lapse.KeyRangeError):
        keys_to_trace("random-10-seed-7-range-0-101", 100)
