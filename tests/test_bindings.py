"""Scripts in the way of the bindings of the C++ system: processes forked by torch.multiprocessing, tensors, threads; and their errors."""
import re
import sys
import textwrap

import pytest
from launched import ROOT

torch = pytest.importorskip("torch")

# What such a script begins with. The processes are forked when lapse and torch have been imported.
BEGIN = """
    import os, sys, threading
    import numpy as np
    import torch
    from torch.multiprocessing import get_context
    import lapse

    def environment(nodes):
        port = os.environ["PORT"]
        os.environ.update(DMLC_NUM_SERVER=str(nodes), DMLC_PS_ROOT_URI="127.0.0.1", DMLC_PS_ROOT_PORT=port, LAPSE_SECURITY="none")

    def start(function, *arguments):
        process = get_context("fork").Process(target=function, args=arguments)
        process.start()
        return process

    def end(processes):
        for process in processes:
            process.join(60)
        codes = [process.exitcode for process in processes]
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
        return codes
"""


@pytest.fixture
def script(jobs, tmp_path, port):
    """script(text) runs a script that begins with BEGIN, and returns its Result."""
    jobs.env["PORT"] = str(port)

    def run(text, deadline=150):
        path = tmp_path / "script.py"
        path.write_text(textwrap.dedent(BEGIN) + textwrap.dedent(text))
        return jobs.run(sys.executable, path, deadline=deadline)
    return run


def test_the_example(jobs):
    result = jobs.run(sys.executable, "bindings/example.py")
    assert result.code == 0, result.text
    workers = {f"node {node} worker {worker}: OK" for node in range(4) for worker in range(2)}
    assert sorted(line for line in result.lines if line.endswith(": OK")) == sorted(workers), result.text
    assert result.lines[-1] == "bindings: OK (4 nodes x 2 workers)"


def test_the_example_fails_when_a_sum_is_wrong(jobs, tmp_path):
    """One node pushes something else: every process ends, and the exit code says so."""
    text = (ROOT / "bindings/example.py").read_text()
    assert text.count("kv.push(keys, vals)\n") == 1
    (tmp_path / "example.py").write_text(text.replace("kv.push(keys, vals)\n", "kv.push(keys, vals * (1 + kv.is_local(19)))\n"))
    result = jobs.run(sys.executable, tmp_path / "example.py")
    assert result.code == 1 and "AssertionError: tensor" in result.text, result.text
    assert "bindings: exit codes of the scheduler and the nodes: [" in result.text and "bindings: OK" not in result.text


@pytest.mark.parametrize("nodes", [1, 2])
def test_the_embedding_learns(jobs, nodes):
    result = jobs.launch(nodes, "bindings/embedding.py")
    assert result.code == 0, result.text
    found = re.findall(r"node \d: loss (\S+) -> (\S+)", result.text)
    assert len(found) == nodes and all(float(last) < 0.4 * float(first) for first, last in found), result.text


def test_a_script_of_the_old_bindings(script):
    """A scheduler and 3 nodes with 3 threads each, in the forms that there were: the third argument is `async`, ids may be equal."""
    result = script("""
        NODES, THREADS, KEYS, LENGTH, ROUNDS = 3, 3, 30, 4, 20

        def scheduler():
            os.environ["DMLC_ROLE"] = "scheduler"
            lapse.scheduler(KEYS, THREADS)

        def worker(server, customer, rank, sums, failed):
            try:
                kv = lapse.Worker(0, customer + 1, server)
                keys = torch.LongTensor([0, 7, 29])
                ones, pulled = torch.ones(3, LENGTH), torch.zeros(3, LENGTH)
                kv.begin_setup()
                if rank == 0 and customer == 0:
                    kv.set(torch.LongTensor(range(KEYS)), torch.full((KEYS * LENGTH,), 0.5))
                kv.end_setup()
                for number in range(ROUNDS):
                    kv.push(keys, ones)
                    kv.wait(kv.push(keys, ones, True))
                    kv.localize(keys, number % 2 == 0)
                    timestamp = kv.pull(keys, pulled, True)
                    kv.wait(timestamp)
                    assert pulled.min() >= 0.5 + 2 * (number + 1)
                kv.waitall()
                kv.barrier()
                kv.pull(keys.numpy(), pulled.numpy())
                sums[rank, customer] = pulled[0]            # memory that all processes share
                untouched = np.zeros((1, LENGTH), np.float32)
                kv.pull(np.array([3]), untouched)
                assert (untouched == 0.5).all() and kv.get_key_size() == LENGTH and kv.num_keys == KEYS
                kv.finalize()
            except BaseException as error:
                failed.append(error)
                raise

        def node(sums):
            os.environ["DMLC_ROLE"] = "server"
            lapse.setup(KEYS, THREADS)
            server, failed = lapse.Server(KEYS, LENGTH), []
            rank = server.my_rank()
            threads = [threading.Thread(target=worker, args=(server, customer, rank, sums, failed)) for customer in range(THREADS)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            server.barrier()
            server.shutdown()
            sys.exit(len(failed))

        environment(NODES)
        sums = torch.zeros(NODES, THREADS, LENGTH).share_memory_()
        codes = end([start(scheduler)] + [start(node, sums) for _ in range(NODES)])
        print("codes", codes)
        print("sums", sums.unique().tolist())
        """)
    assert result.code == 0, result.text
    assert f"codes {[0] * 4}" in result.lines, result.text
    assert f"sums [{0.5 + 3 * 3 * 20 * 2}]" in result.lines, result.text


def test_import_starts_nothing_that_a_fork_would_break(script):
    """No thread, no socket or other descriptor; what setup records is the child's, too."""
    result = script("""
        before = set(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
        import lapse.launch, lapse.sampling, lapse.stats
        lapse.setup(10, 1)
        print("threads", threading.active_count(), len(os.listdir("/proc/self/task")) - before[1])
        print("opened", sorted(set(os.listdir("/proc/self/fd")) - before[0]))

        def child():
            with lapse.Server(2) as server, lapse.Worker(0, server) as kv:
                kv.push(torch.tensor([1]), torch.ones(2))
                print(f"pulled {kv.pull([1]).tolist()}\\n", end="", flush=True)      # one write: two processes' lines do not mix

        print("codes", end([start(child), start(child)]))
        """)
    assert result.code == 0, result.text
    assert "threads 1 0" in result.lines and "opened []" in result.lines and "codes [0, 0]" in result.lines, result.text
    assert result.lines.count("pulled [[1.0, 1.0]]") == 2, result.text


def test_a_fork_after_the_server_gets_an_error(script):
    """Whatever the child does with the parent's objects; it ends, and so does the parent. A Server of its own is legal."""
    result = script("""
        lapse.setup(10, 1)
        server = lapse.Server(2)
        kv = lapse.Worker(0, server)
        kv.push(torch.tensor([1]), torch.ones(2))

        def child():
            for name, call in (("pull", lambda: kv.pull(torch.tensor([1]), torch.zeros(2))), ("push", lambda: kv.push([1], torch.ones(2))),
                               ("asynchronous pull", lambda: kv.pull([1], torch.zeros(2), True)),
                               ("Worker", lambda: lapse.Worker(1, server)), ("barrier", kv.barrier), ("finalize", kv.finalize),
                               ("shutdown", server.shutdown)):
                try:
                    call()
                    print(name, "went through", flush=True)
                except RuntimeError as error:
                    print(f"{name}: {error}", flush=True)
            lapse.setup(10, 1)
            with lapse.Server(2) as own, lapse.Worker(0, own) as mine:
                mine.push(torch.tensor([1]), torch.full((2,), 5.0))
                print("own", mine.pull([1]).tolist(), flush=True)

        print("codes", end([start(child)]))
        print("parent", kv.pull([1]).tolist())
        kv.finalize()
        server.shutdown()
        """)
    assert result.code == 0, result.text
    for name in ("pull", "push", "asynchronous pull", "Worker", "barrier", "finalize", "shutdown"):
        assert f"{name}: this object belongs to the parent process: a forked child cannot use it" in result.lines, result.text
    assert {"own [[5.0, 5.0]]", "codes [0]", "parent [[1.0, 1.0]]"} <= set(result.lines), result.text


def test_a_forked_node_that_fails_ends_the_others(script):
    """No launcher looks after such processes: the job itself tells the others, so that nobody waits for ever."""
    result = script("""
        def scheduler():
            os.environ["DMLC_ROLE"] = "scheduler"
            lapse.scheduler(10, 1)

        def node(fails):
            os.environ["DMLC_ROLE"] = "server"
            lapse.setup(10, 1)
            server = lapse.Server(2)
            kv = lapse.Worker(0, server)
            kv.push(torch.tensor([9 if fails else 1]), torch.ones(3 if fails else 2))
            kv.barrier()

        environment(2)
        print("codes", end([start(scheduler), start(node, False), start(node, True)]))
        """)
    assert result.code == 0 and "codes [1, 1, 1]" in result.lines, result.text
    assert "1 key has 2 values, but vals has 3 values" in result.text
    assert re.search(r"NodeFailure: node \d .*exited without shutdown after ValueError: 1 key has 2 values", result.text), result.text


@pytest.mark.parametrize("name", ["example", "embedding"])
def test_without_torch(jobs, tmp_path, name):
    (tmp_path / "torch.py").write_text("raise ImportError('No module named torch')\n")
    jobs.env["PYTHONPATH"] = f"{tmp_path}:{jobs.env['PYTHONPATH']}"
    result = jobs.run(sys.executable, f"bindings/{name}.py")
    assert result.code == 1 and result.text == f"bindings/{name}.py needs PyTorch: pip install lapse[torch]\n"


def test_lapse_does_not_import_torch(jobs):
    result = jobs.run(sys.executable, "-c", textwrap.dedent("""
        import pkgutil, sys
        import numpy as np
        import lapse
        lapse.setup(10, 1)
        with lapse.Server(2) as server, lapse.Worker(0, server) as kv:
            kv.push([1], np.ones(2, np.float32))
            try:
                kv.push([1], "something else")
            except TypeError as error:
                print(error)
        print([name for name in sys.modules if name.partition(".")[0] == "torch"])
        """))
    assert result.code == 0 and result.lines == ["vals must be a NumPy array or a torch CPU tensor, not str", "[]"], result.text
