"""The smallest program on Lapse: every worker pulls, pushes and localizes the same few parameters.

Worker w of W (counted over all nodes) adds w + 1 + c to number c of every key, once per iteration, and key k starts as k in
every number. So the sums are known beforehand, whatever relocates when, and each worker checks that it sees them in the end.

    python tracker/dmlc_local.py -s 3 build/apps/simple -v 5 -i 10 -k 14 -t 4
"""
import sys

import numpy as np

import lapse
from lapse.options import add_shared_memory, non_negative_int, positive_int, program_parser, system_settings, whole
from lapse.program import run_program, run_workers

KEYS_PRINTED = 100      # per worker; the other keys are checked all the same


def parse(argv):
    parser = program_parser("simple", "Workers pull, push and localize a few parameters, and check the sums.")
    parser.add_argument("-k", "--num_keys", type=whole(1, 2**40), default=10, metavar="N", help="number of parameters")
    parser.add_argument("-t", "--num_threads", type=positive_int, default=2, metavar="N", help="worker threads per process")
    parser.add_argument("-i", "--num_iterations", type=non_negative_int, default=4, metavar="N", help="iterations")
    parser.add_argument("-v", "--num_values_per_key", type=positive_int, default=3, metavar="N", help="values per key")
    add_shared_memory(parser)
    return parser.parse_args(argv)


def initialize(kv, me, workers, num_keys, length):
    """Set key k to k, in every number; the workers share the keys out."""
    keys = np.arange(me, num_keys, workers)
    kv.set(keys, np.repeat(keys.astype(np.float64), length))


def train(kv, me, workers, num_keys, length, iterations):
    """Run the iterations; return how often a pull did not show this worker's own pushes."""
    keys = np.arange(num_keys)
    update = np.tile(me + 1.0 + np.arange(length), (num_keys, 1))
    before = np.empty((num_keys, length))
    after = np.empty((num_keys, length))
    misses = 0
    for iteration in range(iterations):
        kv.pull(keys, before)
        kv.push(keys, update)
        kv.localize(keys[(keys + iteration) % workers == me])       # in every iteration other ones
        kv.pull(keys, after)
        misses += int(np.count_nonzero(after < before + update))    # more may have come: the other workers add, too
    return misses


def report(rank, worker, values, expected, misses):
    """Return the text that says what this worker sees, and whether it is right."""
    wrong = (values != expected).any(axis=1)
    lines = []
    for key in range(min(len(values), KEYS_PRINTED)):
        lines.append(f"node {rank} worker {worker} key {key}: sum {values[key].sum()} "
                     f"{'but' if wrong[key] else '='} expected {expected[key].sum()}")
    if len(values) > KEYS_PRINTED:
        lines.append(f"node {rank} worker {worker}: {np.count_nonzero(wrong)} of {len(values)} keys are wrong")
    if misses:
        lines.append(f"node {rank} worker {worker}: {misses} values did not show the worker's own push")
    return lines, not wrong.any() and not misses


def main(argv=None):
    args = parse(argv)
    num_keys, num_threads, length = args.num_keys, args.num_threads, args.num_values_per_key

    lapse.setup(num_keys, num_threads, **system_settings(args))
    if lapse.is_scheduler():
        lapse.scheduler(num_keys, num_threads)
        return 0
    server = lapse.Server(length, dtype="float64")      # sums of whole numbers are exact up to 2**53
    rank, workers = server.my_rank(), server.num_nodes * num_threads
    total = sum(range(1, workers + 1)) + workers * np.arange(length)
    expected = np.arange(num_keys)[:, np.newaxis] + args.num_iterations * total.astype(np.float64)

    def work(worker):
        kv = lapse.Worker(worker, server)
        me = rank * num_threads + worker
        kv.begin_setup()
        initialize(kv, me, workers, num_keys, length)
        kv.end_setup()
        misses = train(kv, me, workers, num_keys, length, args.num_iterations)
        kv.barrier()
        values = np.empty((num_keys, length))
        kv.pull(np.arange(num_keys), values)
        kv.finalize()
        return report(rank, worker, values, expected, misses)

    reports = run_workers(num_threads, work)
    server.shutdown()
    right = all(ok for _, ok in reports)
    for lines, _ in reports:
        sys.stdout.writelines(line + "\n" for line in lines)
    sys.stdout.write(f"node {rank} simple: {'OK' if right else 'WRONG'} ({server.num_nodes} nodes x {num_threads} workers, "
                     f"{num_keys} keys, {length} values per key, {args.num_iterations} iterations)\n")
    return 0 if right else 1


if __name__ == "__main__":
    run_program(main)
