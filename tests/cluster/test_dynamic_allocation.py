"""All workers push to and pull one key, and localize it again and again: no update may be lost, no own read may go back.

    python tracker/dmlc_local.py -s 4 build/tests/test_dynamic_allocation
"""
from collections import deque

import numpy as np
from common import iterations, program_options, run_node

from lapse.options import non_negative_int, positive_int
from lapse.program import run_program

NAME = "test_dynamic_allocation"
LENGTH = 2      # both numbers get the same updates: they differ only in a torn row


def parse(argv):
    parser = program_options(NAME, "Workers push to, pull and localize one key.", rounds=(100_000, 2_000))
    parser.add_argument("--localize_every", type=positive_int, default=1000, metavar="N",
                        help="iterations between two localizes of a worker")
    parser.add_argument("--window", type=non_negative_int, default=32, metavar="N",
                        help="operations of a worker in flight; 0: every call waits")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    rounds = iterations(args)

    def work(kv, checks, me, workers, server):
        key = np.zeros(1, dtype=np.int64)
        one = np.ones(LENGTH, dtype=args.dtype)
        seen = np.full((rounds, LENGTH), -1, dtype=args.dtype)
        asynchronous = args.window > 0
        pending = deque()
        kv.begin_setup()
        kv.end_setup()
        for i in range(rounds):
            if (i + 1) % args.localize_every == 0:
                pending.append(kv.localize(key, asynchronous))
            pending.append(kv.push(key, one, asynchronous))
            pending.append(kv.pull(key, seen[i], asynchronous))
            while len(pending) > args.window:
                kv.wait(pending.popleft())
        kv.waitall()
        own = np.arange(1, rounds + 1)
        checks.that((seen[:, 0] == seen[:, 1]).all(), "a row was torn")
        checks.that((np.diff(seen[:, 0]) >= 0).all(), "a read went back")
        checks.that((seen[:, 0] >= own).all(), "a read missed an own push")
        checks.that((seen[:, 0] <= own + (workers - 1) * rounds).all(), "a read saw more pushes than there can be")
        kv.barrier()
        total = np.empty(LENGTH, dtype=args.dtype)
        kv.pull(key, total)
        checks.equal("total", int(total[0]), workers * rounds)
        checks.that(total[0] == total[1], "the final row is torn")

    return run_node(NAME, args, 1, LENGTH, work)


if __name__ == "__main__":
    run_program(main)
