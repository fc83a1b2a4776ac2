"""No call blocks for ever while another node is gone: every blocking call, with a peer that is killed or frozen meanwhile; and Ctrl-C.

The peer is stopped first, so that all the calls certainly wait for it; then it is killed, or stays as it is. The calls of one node wait in
threads of their own, each on a Worker of its own, at the same time.
"""
import re
from pathlib import Path

import pytest

from lapse.hosts import STOPPED

CALLS = ["pull", "push", "set", "localize", "wait", "waitall", "result", "pull_sample", "barrier", "begin_setup", "end_setup", "finalize",
         "pull with timeout", "is finished", "server.barrier", "c level"]

# Node 0 waits in all calls at once; node 1 is the one that goes. Keys from 50 on are at home on node 1.
WAITERS = """
    import os, pathlib, signal, sys, threading, time
    sys.path.insert(0, sys.argv[3])
    import numpy as np
    import lapse
    import _consistency

    signal.signal(signal.SIGTERM, signal.SIG_IGN)       # the launcher's, when the peer has died: it kills two seconds later
    calls, fate = sys.argv[1].split(","), sys.argv[2]
    THREADS = len(calls)
    lapse.setup(100, THREADS)
    server = lapse.Server(THREADS * 2, dtype="int64")
    server.enable_sampling_support("naive", True, "uniform", 50, 100)
    keys, ones = np.arange(50, 54), np.ones((4, THREADS * 2), np.int64)
    if server.my_rank() == 1:
        print("pid", os.getpid(), flush=True)
        workers = [lapse.Worker(n, server) for n in range(THREADS)]
        workers[0].set(np.array([99]), np.full((1, THREADS * 2), os.getpid()))
        server.barrier()
        time.sleep(120)
    server.barrier()
    workers = [lapse.Worker(n, server) for n in range(THREADS)]
    peer = int(workers[0].pull(np.array([99]))[0, 0])
    sample = {n: kv.prepare_sample(4) for n, kv in enumerate(workers) if calls[n] == "pull_sample"}

    def result(kv, n):
        import asyncio
        async def wait():
            await kv.pull(keys, asynchronous=True)
        asyncio.run(wait())

    def c_level(kv, n):
        observer = _consistency.Observer(n, THREADS * 2, 100, 10)
        code = _consistency.run(kv, observer, 1000000000, 8, 4, 1)
        assert code, "it did not wait"
        kv.waitall()        # raises what the code stands for

    def asynchronous_wait(kv, n):
        kv.wait(kv.push(keys, ones, True))

    def poll(kv, n):
        ts = kv.push(keys, ones, True)
        while not kv.is_finished(ts):
            time.sleep(0.001)

    DO = {
        "pull": lambda kv, n: kv.pull(keys), "push": lambda kv, n: kv.push(keys, ones), "set": lambda kv, n: kv.set(keys, ones),
        "localize": lambda kv, n: kv.localize(keys + 8), "wait": asynchronous_wait,
        "waitall": lambda kv, n: (kv.push(keys, ones, True), kv.waitall()),
        "result": result, "pull_sample": lambda kv, n: kv.pull_sample(sample[n], np.empty(4, np.int64)),
        "barrier": lambda kv, n: kv.barrier(), "begin_setup": lambda kv, n: kv.begin_setup(), "end_setup": lambda kv, n: kv.end_setup(),
        "finalize": lambda kv, n: kv.finalize(), "pull with timeout": lambda kv, n: kv.pull(keys, timeout=100),
        "is finished": poll, "server.barrier": lambda kv, n: server.barrier(), "c level": c_level,
    }
    inside = threading.Semaphore(0)

    def work(n):
        inside.release()
        try:
            DO[calls[n]](workers[n], n)
            outcome = "returned"
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"
        os.write(1, f"{calls[n]}; {outcome}\\n".encode())

    def stopped():
        states = [pathlib.Path(f"/proc/{peer}/task/{task}/stat").read_text().rpartition(")")[2].split()[0]
                  for task in os.listdir(f"/proc/{peer}/task")]
        return set(states) == {"T"}

    os.kill(peer, signal.SIGSTOP)
    while not stopped():        # a busy machine takes a while
        time.sleep(0.001)
    threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        inside.acquire()
    time.sleep(0.3)             # most likely inside of the calls; right without it, too
    if fate == "killed":
        os.kill(peer, signal.SIGKILL)
    try:
        if fate == "interrupted":
            os.kill(os.getpid(), signal.SIGINT)
        for thread in threads:
            thread.join(30)
    except KeyboardInterrupt:
        for thread in threads:
            thread.join(30)
    os.kill(peer, signal.SIGCONT) if fate == "interrupted" else None
    os._exit(5)
"""


def outcomes(text):
    return dict(re.findall(r"^\[node 0\] ([a-z_ .]+); (.*)$", text, re.MULTILINE))


@pytest.mark.parametrize("fate", ["killed", "frozen", "interrupted"])
def test_every_call_that_waits_ends(run_program, fate):
    folder = Path(__file__).parents[1] / "cluster"
    done = run_program(WAITERS, nodes=2, check=None, args=(",".join(CALLS), fate, folder))
    said = outcomes(done.stdout)
    assert sorted(said) == sorted(CALLS), done.stdout + done.stderr
    how = {"killed": r"killed by signal 9 \(SIGKILL\)", "frozen": re.escape(STOPPED)}.get(fate)
    for call, what in said.items():
        if how:
            assert re.match(rf"NodeFailure: node 1 \(.*\): {how}", what), f"{call}: {what}\n{done.stdout}{done.stderr}"
        else:
            assert what == "Interrupted: interrupted by Ctrl-C", f"{call}: {what}\n{done.stdout}{done.stderr}"
    assert done.returncode != 0


LEAVERS = """
    import os, signal, sys, threading, time
    import lapse
    how, fate = sys.argv[1:]
    rank = int(os.environ["LAPSE_RANK"])
    victim = rank == 1
    def go():
        if victim:
            if fate == "frozen":
                os.kill(os.getpid(), signal.SIGSTOP)
                time.sleep(60)      # this thread may go on for a moment, until the one that got the signal has stopped them all
            os.kill(os.getpid(), signal.SIGKILL)
    lapse.setup(10, 1)
    if how == "Server":
        # in the middle of joining: the scheduler knows of it
        from lapse.link import Link
        bind = Link._bind
        Link._bind = lambda self, welcome: (go(), bind(self, welcome))
    server = lapse.Server(1)
    with lapse.Worker(0, server) as kv:
        kv.pull([1])
    if how == "job_stats":
        go()
        server.job_stats()
    go()
    server.shutdown()
    """


@pytest.mark.parametrize("fate", ["killed", "frozen"])
@pytest.mark.parametrize("how", ["Server", "job_stats", "shutdown"])
def test_joining_and_leaving_end(run_program, how, fate):
    done = run_program(LEAVERS, nodes=2, check=None, args=(how, fate))
    cause = r"killed by signal 9 \(SIGKILL\)" if fate == "killed" else re.escape(STOPPED)
    assert re.search(rf"^\[node 0\] lapse\.errors\.NodeFailure: node 1 \(.*\): {cause}", done.stderr, re.MULTILINE), done.stderr
    assert done.returncode == (137 if fate == "killed" else 1), done.stderr


