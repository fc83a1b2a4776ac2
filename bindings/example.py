#!/usr/bin/env python3
"""Lapse with PyTorch: a job of 4 nodes x 2 workers, whose processes torch.multiprocessing forks after `import lapse`.

    python bindings/example.py

All workers push to the same parameters, from tensors and from arrays, waiting and not waiting, and check the sums; one parameter is
longer than the others. Exit code 0 when every worker has found what it expected.
"""
import os
import secrets
import socket
import sys
import threading

import numpy as np

import lapse

try:
    import torch
    import torch.multiprocessing as mp
except ImportError:
    sys.exit("bindings/example.py needs PyTorch: pip install lapse[torch]")

NODES, WORKERS = 4, 2
ALL = NODES * WORKERS
NUM_KEYS, LENGTH = 20, 3
LONG_KEY, LONG_LENGTH = 7, 10       # the parameter that is longer
OWN = 8                             # from here on one parameter per worker


def synchronous_tensors(kv):
    """Push and pull tensors; each call returns when it is done."""
    keys = torch.tensor([0, 5])
    vals = torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])
    kv.push(keys, vals)
    kv.barrier()
    pulled = torch.empty_like(vals)
    kv.pull(keys, pulled)           # fills the tensor in place
    assert torch.equal(pulled, ALL * vals), pulled


def asynchronous_arrays(kv):
    """Push and pull arrays; each call returns a timestamp at once, and they are seen in this order."""
    keys = np.array([1, 4])
    vals = np.ones((2, LENGTH), np.float32)
    pulled = np.empty_like(vals)
    kv.push(keys, vals, True)
    kv.waitall()
    kv.barrier()
    timestamp = kv.pull(keys, pulled, True)
    kv.wait(timestamp)
    assert (pulled == ALL).all(), pulled


def values_of_another_length(kv):
    """The values of several parameters follow each other in one flat tensor, in the order of the keys."""
    keys = torch.tensor([2, LONG_KEY])
    assert [kv.get_key_size(int(key)) for key in keys] == [LENGTH, LONG_LENGTH]
    vals = torch.arange(LENGTH + LONG_LENGTH, dtype=torch.float32)
    kv.wait(kv.push(keys, vals, True))
    kv.barrier()
    pulled = torch.empty(LENGTH + LONG_LENGTH)
    kv.pull(keys, pulled)
    assert torch.equal(pulled, ALL * vals), pulled


def a_parameter_that_comes_here(kv, number):
    """Set one's own parameter, relocate it, and find it in the memory of this process."""
    key, vals = torch.tensor([OWN + number]), torch.full((1, LENGTH), float(number))
    kv.set(key, vals)
    kv.localize(key)
    pulled = torch.empty_like(vals)
    assert kv.pull_if_local(key, pulled), "nobody else wants it, so it is still here"
    assert torch.equal(pulled, vals), pulled


def run_worker(server, worker, failed):
    name = f"node {server.my_rank()} worker {worker}"
    try:
        kv = lapse.Worker(0, worker, server)        # application 0; the numbers are labels
        synchronous_tensors(kv)
        asynchronous_arrays(kv)
        values_of_another_length(kv)
        a_parameter_that_comes_here(kv, server.my_rank() * WORKERS + worker)
        kv.finalize()
        print(f"{name}: OK\n", end="", flush=True)
    except Exception as error:
        failed.append(error)
        print(f"{name}: {type(error).__name__}: {error}\n", end="", file=sys.stderr, flush=True)


def run_scheduler():
    os.environ["DMLC_ROLE"] = "scheduler"
    lapse.scheduler(NUM_KEYS, WORKERS)


def run_node():
    os.environ["DMLC_ROLE"] = "server"
    lapse.setup(NUM_KEYS, WORKERS)
    lengths = torch.full((NUM_KEYS,), LENGTH)
    lengths[LONG_KEY] = LONG_LENGTH
    server, failed = lapse.Server(lengths), []
    threads = [threading.Thread(target=run_worker, args=(server, worker, failed), daemon=True) for worker in range(WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        sys.exit(1)                 # without shutdown: this ends the job on the other nodes, too
    server.shutdown()


def main():
    with socket.socket() as held:   # a port for the scheduler, which nobody else is given as long as this socket is there
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        os.environ.update(DMLC_NUM_SERVER=str(NODES), DMLC_PS_ROOT_URI="127.0.0.1", DMLC_PS_ROOT_PORT=str(held.getsockname()[1]),
                          LAPSE_TOKEN=secrets.token_hex(16))    # without one, whoever can reach the port could join
        context = mp.get_context("fork")
        processes = [context.Process(target=run_scheduler), *(context.Process(target=run_node) for _ in range(NODES))]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    codes = [process.exitcode for process in processes]
    if any(codes):
        sys.exit(f"bindings: exit codes of the scheduler and the nodes: {codes}")
    print(f"bindings: OK ({NODES} nodes x {WORKERS} workers)")


if __name__ == "__main__":
    main()
