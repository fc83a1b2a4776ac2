"""Sets: seen by all, in program order with pushes and pulls, never torn, the last one wins; while keys relocate.

    python tracker/dmlc_local.py -s 3 build/tests/test_set_operation
"""
import numpy as np
from common import iterations, program_options, run_node

from lapse.options import positive_int
from lapse.program import run_program

NAME = "test_set_operation"
LENGTH = 4


def parse(argv):
    parser = program_options(NAME, "Workers set, push, pull and localize.", rounds=(2_000, 100))
    parser.add_argument("-k", "--num_keys", type=positive_int, default=60, metavar="N", help="number of parameters")
    return parser.parse_args(argv)


def rows(numbers, dtype):
    """Return one row of equal numbers for each."""
    return np.repeat(np.asarray(numbers, dtype=dtype)[:, np.newaxis], LENGTH, axis=1)


def main(argv=None):
    args = parse(argv)
    rounds = iterations(args)
    num_keys = args.num_keys

    def work(kv, checks, me, workers, server):
        random = np.random.default_rng([args.seed, me])
        everything = np.arange(num_keys)
        mine = np.arange(me, num_keys, workers)         # these keys are written by this worker alone in the first part

        def pull(keys):
            values = np.full((len(keys), LENGTH), -1, dtype=args.dtype)
            kv.pull(keys, values)
            return values

        def steal(asynchronous=True):
            if random.random() < 0.3:
                kv.localize(random.integers(num_keys, size=random.integers(1, 8)), asynchronous)

        # A worker reads what it has set, waiting or not; a push after the set counts.
        for i in range(rounds):
            steal()
            kv.set(mine, rows(mine + 10 * i, args.dtype))
            checks.that((pull(mine) == rows(mine + 10 * i, args.dtype)).all(), f"round {i}: not what was set")
            steal()
            seen = np.full((len(mine), LENGTH), -1, dtype=args.dtype)
            kv.set(mine, rows(mine + 10 * i + 4, args.dtype), True)
            kv.push(mine, rows(np.ones(len(mine)), args.dtype), True)
            kv.wait(kv.pull(mine, seen, True))
            checks.that((seen == rows(mine + 10 * i + 5, args.dtype)).all(), f"round {i}: not set, then pushed")
        kv.waitall()
        kv.barrier()
        last = rows(everything + 10 * (rounds - 1) + 5, args.dtype)
        checks.that((pull(everything) == last).all(), "another worker's set is not seen")
        kv.barrier()

        # Everybody pushes; then a set forgets the pushes.
        kv.push(everything, rows(np.ones(num_keys), args.dtype))
        kv.barrier()
        checks.that((pull(everything) == last + workers).all(), "pushes after a set are not exact")
        kv.barrier()
        kv.set(mine, rows(np.zeros(len(mine)), args.dtype))
        kv.barrier()
        checks.that((pull(everything) == 0).all(), "a set did not overwrite")
        kv.barrier()

        # Duplicates in one call: the last one wins, every push counts.
        for key in mine:
            kv.set(np.full(3, key), rows([3, 1, 2], args.dtype))
            checks.that((pull(np.full(1, key)) == 2).all(), f"key {key}: the last of a call's duplicates did not win")
            kv.push(np.full(3, key), rows([1, 1, 1], args.dtype))
            checks.that((pull(np.full(2, key)) == 5).all(), f"key {key}: not every duplicate of a push counted")
        kv.barrier()

        # Everybody sets the same keys at once: no row is torn, and in the end it is some worker's last set, for everybody.
        def code(i):
            return 1 + me * rounds + i

        for i in range(rounds):
            steal()
            kv.set(everything, rows(np.full(num_keys, code(i)), args.dtype), i % 2 == 0)
            seen = pull(everything)
            checks.that((seen == seen[:, :1]).all(), f"round {i}: a row is torn")
        kv.waitall()
        kv.barrier()
        final = pull(everything)
        checks.that((final == final[:, :1]).all(), "a final row is torn")
        checks.that(((final.astype(np.int64) - 1) % rounds == rounds - 1).all(), "an old set came last")
        shadow = everything + num_keys
        if me == 0:
            kv.set(shadow, final)
        kv.barrier()
        checks.that((pull(shadow) == final).all(), "two workers see different final values")
        checks.equal("keys whose final value is some worker's last set:", int(np.isin(
            final[:, 0], [1 + worker * rounds + rounds - 1 for worker in range(workers)]).sum()), num_keys)

    return run_node(NAME, args, 2 * num_keys, LENGTH, work)


if __name__ == "__main__":
    run_program(main)
