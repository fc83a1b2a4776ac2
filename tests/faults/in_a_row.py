"""`in_a_row.py JOBS CYCLES`: so many jobs in a row, and so many nodes that start and stop, in one process, which stays as it was."""
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

import lapse

GRACE = 3       # seconds: the kernel tells that a thread has ended before it has gone from /proc
WARM = 3        # the first ones make what stays: modules, pools of threads, the resource tracker


def job(kv):
    kv.push(np.arange(10), np.ones((10, 2), np.float32))
    kv.localize(np.arange(10))
    kv.barrier()
    return float(kv.pull([3])[0, 0])


def one_job():
    results = lapse.launch(job, num_keys=10, value_length=2, nodes=2, workers=1)
    assert np.ravel(results).tolist() == [2.0, 2.0], results


def one_life():
    lapse.setup(10, 1)
    with lapse.Server(10, 2) as server, lapse.Worker(0, server) as kv:
        kv.push([1], np.ones(2, np.float32), True)


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def state():
    """What may not grow."""
    return {"descriptors": len(names("/proc/self/fd")), "threads": sorted(thread.name for thread in threading.enumerate()),
            "tasks": len(names("/proc/self/task")), "shared memory": names("/dev/shm"), "files": names(tempfile.gettempdir()),
            "children": Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


def main():
    wrong = 0
    for what, number in ((one_job, int(sys.argv[1])), (one_life, int(sys.argv[2]))):
        for _ in range(WARM):
            what()
        before = state()
        for _ in range(number):
            what()
        end = time.monotonic() + GRACE
        while (after := state()) != before and time.monotonic() < end:
            time.sleep(0.01)
        print(f"{what.__name__}: {number} times; {after}")
        if after != before:
            print(f"{what.__name__}: before {before}")
            wrong += 1
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
