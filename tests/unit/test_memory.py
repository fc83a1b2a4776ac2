"""Memory is bounded by the store and the workers' credit, whatever is issued without waiting, and however slow the other node is."""
import re

import pytest

# Node 0 pushes to, and pulls from, keys at home on node 1, and never waits. Each node reports its own highest resident size.
FLOOD = """
    import os, signal, sys, threading, time
    import numpy as np
    import lapse

    operations, length, pulses = map(int, sys.argv[1:])
    CREDIT = 16 << 20
    lapse.setup(100, 1, credit_bytes=CREDIT)
    server = lapse.Server(length, dtype="int64")
    kv = lapse.Worker(0, server)
    rank = server.my_rank()

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    keys = np.arange(50, 58)
    ones, into = np.ones((8, length), np.int64), np.empty((8, length), np.int64)
    kv.begin_setup()
    if rank == 1:
        kv.set(np.array([0]), np.full((1, length), os.getpid()))
    for _ in range(2):                              # what is allocated once
        kv.push(keys, ones)
        kv.pull(keys, into)
    kv.end_setup()
    before, most, done = resident(), 0, threading.Event()

    def watch():
        global most
        while not done.wait(0.005):
            most = max(most, resident())

    def pulse(pid):
        for _ in range(pulses):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(1)                           # shorter than the heartbeats' timeout
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.3)
        stopped.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    if rank == 0:
        stopped = threading.Event()
        peer = int(kv.pull(np.array([0]))[0, 0])
        threading.Thread(target=pulse, args=(peer,), daemon=True).start()
        issued = 0
        while issued < operations or not stopped.is_set():
            if issued % 4 == 3:
                kv.pull(keys, into, True)
            else:
                kv.push(keys, ones, True)
            issued += 1
    kv.waitall()
    kv.barrier()
    if rank == 0:
        right = (kv.pull(keys) == 2 * 2 + issued - issued // 4).all()
        print("issued", issued, "right" if right else "wrong", flush=True)
    kv.finalize()
    done.set()
    watcher.join()
    server.shutdown()
    print("grew by", (most - before) >> 10, "KiB, credit", CREDIT >> 10, "KiB", flush=True)
    """


@pytest.mark.slow
@pytest.mark.parametrize(("operations", "length", "pulses"), [(1_000_000, 2, 0), (2_000, 4096, 3)], ids=["flood", "slow consumer"])
def test_memory_is_bounded(run_program, operations, length, pulses):
    done = run_program(FLOOD, nodes=2, args=(operations, length, pulses), timeout=400)
    issued = re.search(r"issued (\d+) right", done.stdout)
    assert issued and int(issued[1]) >= operations, done.stdout
    grown = {int(node): int(kib) for node, kib in re.findall(r"^\[node (\d)\] grew by (-?\d+) KiB", done.stdout, re.MULTILINE)}
    # Sent and not taken yet, or taken and not handled yet: once the credit at either end, and libzmq's own buffers.
    assert sorted(grown) == [0, 1] and all(kib < 2 * 16 * 1024 for kib in grown.values()), done.stdout
