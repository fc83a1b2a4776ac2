"""Random calls of up to 1,000 of 10,000 keys, with duplicates, while random keys relocate; with and without waiting.

Every worker can draw the calls of every other worker from its seed, so the final values are known exactly.

    python tracker/dmlc_local.py -s 3 build/tests/test_many_key_operations
"""
import threading
from collections import deque

import numpy as np
from common import iterations, program_options, run_node

from lapse.options import positive_int
from lapse.program import run_program

NAME = "test_many_key_operations"
LENGTH = 3
PHASES = ("waiting", "not waiting")


def parse(argv):
    parser = program_options(NAME, "Workers push, pull and localize random keys in large calls.", rounds=(500, 40), threads=4)
    parser.add_argument("-k", "--num_keys", type=positive_int, default=10_000, metavar="N", help="number of parameters")
    parser.add_argument("--max_keys", type=positive_int, default=1_000, metavar="N", help="most keys of a call")
    parser.add_argument("--window", type=positive_int, default=16, metavar="N", help="calls in flight without waiting")
    return parser.parse_args(argv)


def pushes(args, calls, worker, phase):
    """Yield the keys and values that a worker pushes in a phase."""
    random = np.random.default_rng([args.seed, worker, phase])
    for _ in range(calls):
        keys = random.integers(args.num_keys, size=random.integers(1, args.max_keys + 1))
        yield keys, random.integers(1, 5, size=(len(keys), LENGTH)).astype(args.dtype)


class Totals:
    """The sums of all workers' pushes, drawn again from their seeds, once per process."""

    def __init__(self, args, calls):
        self.args, self.calls = args, calls
        self.lock = threading.Lock()
        self.sums = None

    def get(self, workers):
        with self.lock:
            if self.sums is None:
                self.sums = np.zeros((self.args.num_keys, LENGTH), dtype=self.args.dtype)
                for worker in range(workers):
                    for phase in range(len(PHASES)):
                        for keys, values in pushes(self.args, self.calls, worker, phase):
                            np.add.at(self.sums, keys, values)
        return self.sums


def main(argv=None):
    args = parse(argv)
    calls = iterations(args)
    totals = Totals(args, calls)

    def work(kv, checks, me, workers, server):
        random = np.random.default_rng([args.seed, me, len(PHASES)])
        own = np.zeros((args.num_keys, LENGTH), dtype=args.dtype)       # what this worker has pushed
        last = np.zeros_like(own)                                       # the newest that it has seen
        pending = deque()

        def settle():
            ts, keys, values, least = pending.popleft()
            kv.wait(ts)
            checks.that((values >= least).all(), "a pull missed an own push, or left a position empty")
            checks.that((values >= last[keys]).all(), "a pull went back")
            np.maximum.at(last, keys, values)

        for phase in range(len(PHASES)):
            asynchronous = phase == 1
            kv.barrier()
            for keys, values in pushes(args, calls, me, phase):
                if random.random() < 0.25:
                    kv.localize(random.integers(args.num_keys, size=random.integers(1, args.max_keys + 1)), asynchronous)
                kv.push(keys, values, asynchronous)
                np.add.at(own, keys, values)
                wanted = random.integers(args.num_keys, size=random.integers(1, args.max_keys + 1))
                wanted[::3] = keys[random.integers(len(keys), size=len(wanted[::3]))]
                seen = np.full((len(wanted), LENGTH), -1, dtype=args.dtype)
                pending.append((kv.pull(wanted, seen, asynchronous), wanted, seen, own[wanted]))
                while len(pending) >= (args.window if asynchronous else 1):
                    settle()
            while pending:
                settle()
            kv.waitall()
        kv.barrier()
        everything = np.arange(args.num_keys)
        final = np.full_like(own, -1)
        kv.pull(everything, final)
        expected = totals.get(workers)
        checks.equal("keys with a wrong total:", int((final != expected).any(axis=1).sum()), 0)
        checks.equal("sum of all values", int(final.sum(dtype=np.float64)), int(expected.sum(dtype=np.float64)))

    return run_node(NAME, args, args.num_keys, LENGTH, work)


if __name__ == "__main__":
    run_program(main)
