"""Start, barriers, end: every node and worker is there once, and a barrier keeps what is before it from what is after it.

    python tracker/dmlc_local.py -s 4 build/tests/test_connection
"""
import numpy as np
from common import iterations, program_options, run_node

from lapse.program import run_program

NAME = "test_connection"


def main(argv=None):
    args = program_options(NAME, "Workers meet at barriers.", rounds=(1_000, 50)).parse_args(argv)
    rounds = iterations(args)

    def work(kv, checks, me, workers, server):
        rank, nodes = server.my_rank(), server.num_nodes
        one = np.ones(1, dtype=args.dtype)

        def value(key):
            number = np.full(1, -1, dtype=args.dtype)
            kv.pull(np.array([key]), number)
            return int(number[0])

        # Key 0: who is there.
        checks.that(0 <= rank < nodes, f"rank {rank} of {nodes} nodes")
        checks.that(kv.num_keys == 3, f"num_keys is {kv.num_keys}")
        kv.push(np.array([0]), one)
        kv.barrier()
        checks.equal("workers", value(0), workers)

        # Key 1: barriers in the open, and as begin and end of a set-up.
        for i in range(rounds):
            kv.push(np.array([1]), one)
            begin, end = (kv.begin_setup, kv.end_setup) if i % 10 == 0 else (kv.barrier, kv.barrier)
            begin()
            checks.that(value(1) == (i + 1) * workers, f"round {i}: {value(1)} pushes, not {(i + 1) * workers}")
            end()
        checks.equal("barriers:", value(1), rounds * workers)

        # Key 2: one worker does it, the others see it; each in its turn.
        for i in range(workers):
            if i == me:
                kv.set(np.array([2]), np.full(1, 100 + me, dtype=args.dtype))
            kv.barrier()
            checks.that(value(2) == 100 + i, f"turn {i}: {value(2)} instead of {100 + i}")
            kv.barrier()

        # An asynchronous operation is not completed by a barrier of others, but by waitall, begin_setup and finalize.
        kv.push(np.array([0]), one, True)
        kv.waitall()
        kv.barrier()
        checks.equal("workers, twice:", value(0), 2 * workers)
        kv.barrier()
        kv.push(np.array([0]), one, True)
        kv.begin_setup()
        checks.equal("workers, three times:", value(0), 3 * workers)
        kv.end_setup()
        kv.push(np.array([0]), one, True)
        kv.finalize()
        kv.finalize()       # again: nothing happens

    return run_node(NAME, args, 3, 1, work)


if __name__ == "__main__":
    run_program(main)
