"""Keys of different lengths in one call, with duplicates, while they relocate: every number ends where it belongs.

    python tracker/dmlc_local.py -s 3 build/tests/test_variable_length_values
"""
import numpy as np
from common import iterations, program_options, run_node

from lapse.options import non_negative_int, positive_int
from lapse.program import run_program

NAME = "test_variable_length_values"


def parse(argv):
    parser = program_options(NAME, "Workers use keys of different lengths.", rounds=(2_000, 100))
    parser.add_argument("-k", "--num_keys", type=positive_int, default=200, metavar="N", help="number of parameters")
    parser.add_argument("--longest", type=positive_int, default=9, metavar="N", help="key k has 1 + k modulo N values")
    parser.add_argument("--stored_extra", type=non_negative_int, default=0, metavar="N",
                        help="values per key that the owner stores beside those that a pull returns")
    return parser.parse_args(argv)


class Layout:
    """Where the values of all keys would be in one flat array."""

    def __init__(self, num_keys, longest):
        self.lengths = 1 + np.arange(num_keys) % longest
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.size = int(self.lengths.sum())

    def places(self, keys):
        """Return the places of the values of `keys`, one key after the other."""
        lengths = self.lengths[keys]
        before = np.cumsum(lengths) - lengths
        return np.repeat(self.starts[keys] - before, lengths) + np.arange(lengths.sum())


def main(argv=None):
    args = parse(argv)
    calls = iterations(args)
    layout = Layout(args.num_keys, args.longest)

    def draw(random):
        return random.integers(args.num_keys, size=random.integers(1, 50))

    def pushes(worker):
        random = np.random.default_rng([args.seed, worker])
        for _ in range(calls):
            keys = draw(random)
            places = layout.places(keys)
            yield keys, places, random.integers(1, 5, size=len(places)).astype(args.dtype)

    def work(kv, checks, me, workers, server):
        random = np.random.default_rng([args.seed, me, 1])
        own = np.zeros(layout.size, dtype=args.dtype)
        last = np.zeros_like(own)
        for key in range(args.num_keys):
            checks.that(kv.get_key_size(key) == layout.lengths[key], f"get_key_size({key}) is {kv.get_key_size(key)}")

        # Every value of every key is another number: a shifted or swapped value shows.
        everything = np.arange(args.num_keys)
        start = (np.arange(layout.size) % 1000).astype(args.dtype)
        mine = np.arange(me, args.num_keys, workers)
        kv.begin_setup()
        kv.set(mine, start[layout.places(mine)])
        kv.end_setup()
        shuffled = random.permutation(args.num_keys)
        values = np.full(layout.size, -1, dtype=args.dtype)
        kv.pull(shuffled, values)
        checks.that((values == start[layout.places(shuffled)]).all(), "a value set is not where it belongs")
        kv.barrier()

        for i, (keys, places, values) in enumerate(pushes(me)):
            if random.random() < 0.3:
                kv.localize(draw(random), True)
            kv.push(keys, values, i % 2 == 0)
            np.add.at(own, places, values)
            wanted = np.concatenate((keys[::2], draw(random)))
            places = layout.places(wanted)
            seen = np.full(len(places), -1, dtype=args.dtype)
            kv.wait(kv.pull(wanted, seen, i % 3 == 0))
            checks.that((seen >= (start + own)[places]).all(), f"call {i}: an own push is missing")
            checks.that((seen >= last[places]).all(), f"call {i}: a pull went back")
            np.maximum.at(last, places, seen)
        kv.waitall()
        kv.barrier()

        expected = start.astype(np.float64)
        for worker in range(workers):
            for _, places, values in pushes(worker):
                np.add.at(expected, places, values)
        final = np.full(layout.size, -1, dtype=args.dtype)
        kv.pull(everything, final)
        checks.equal("wrong values:", int((final != expected).sum()), 0)
        checks.equal("sum of all values", int(final.sum(dtype=np.float64)), int(expected.sum()))

        for size in (layout.size - 1, layout.size + 1):
            try:
                kv.pull(everything, np.empty(size, dtype=args.dtype))
                checks.that(False, f"a pull of {layout.size} values into an array of {size} was accepted")
            except ValueError as error:
                checks.that(str(size) in str(error) and str(layout.size) in str(error),
                            f"the sizes are not named: {error}")

    settings = {"stored_lengths": layout.lengths + args.stored_extra} if args.stored_extra else {}
    return run_node(NAME, args, args.num_keys, layout.lengths, work, **settings)


if __name__ == "__main__":
    run_program(main)
