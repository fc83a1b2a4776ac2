"""Where keys are, and what is known about it: is_local, owner, pull_if_local, localize, is_finished.

    python tracker/dmlc_local.py -s 3 build/tests/test_locality_api
"""
import time

import numpy as np
from common import iterations, program_options, run_node

from lapse.options import positive_int
from lapse.program import run_program

NAME = "test_locality_api"
LENGTH = 2
DEADLINE = 60.0     # seconds for one operation to finish


def parse(argv):
    parser = program_options(NAME, "Keys go from node to node, and every node says where they are.", rounds=(300, 12))
    parser.add_argument("-k", "--num_keys", type=positive_int, default=30, metavar="N", help="number of parameters")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    rounds = iterations(args)

    def work(kv, checks, me, workers, server):
        rank, nodes = server.my_rank(), server.num_nodes
        first_of_node = me % args.num_threads == 0
        keys = np.arange(args.num_keys)
        home = keys // -(-args.num_keys // nodes)

        def check_owner(owner, what):
            """Check where the keys are; `owner` has a rank per key, and nothing is relocating."""
            local = np.asarray(server.is_local(keys))
            checks.that((local == (owner == rank)).all(), f"{what}: is_local is {local}, the owners are {owner}")
            known = np.asarray(server.owner(keys))
            sure = (owner == rank) | (home == rank)
            checks.that((known[sure] == owner[sure]).all(), f"{what}: owner is {known}, the owners are {owner}")
            checks.that(((known >= 0) & (known < nodes)).all(), f"{what}: owner is {known}, there are {nodes} nodes")

        def check_pull_if_local(owner, expected, what):
            """Check pull_if_local of all keys, of the local ones, of each, and of none."""
            values = np.full((len(keys), LENGTH), -1, dtype=args.dtype)
            if not args.shared_memory:      # no row is reached but through the server thread
                checks.that(not kv.pull_if_local(keys, values), f"{what}: pull_if_local without shared memory")
                return
            here = keys[owner == rank]
            checks.that(bool(kv.pull_if_local(keys, values)) == (len(here) == len(keys)), f"{what}: pull_if_local of all keys")
            values = np.full((len(here), LENGTH), -1, dtype=args.dtype)
            checks.that(bool(kv.pull_if_local(here, values)), f"{what}: pull_if_local of the local keys")
            checks.that((values == expected).all(), f"{what}: pull_if_local gave {values}, not {expected}")
            one = np.empty(LENGTH, dtype=args.dtype)
            for key in keys:
                checks.that(bool(kv.pull_if_local(keys[key:key + 1], one)) == (owner[key] == rank),
                            f"{what}: pull_if_local of key {key}, which is on node {owner[key]}")

        # In the beginning every key is at its home.
        kv.begin_setup()
        check_owner(home, "start")
        check_pull_if_local(home, 0, "start")
        kv.end_setup()

        # All keys to one node after the other; then each key to a node of its own.
        owner = home.copy()
        pushed = 0
        for i in range(rounds):
            wanted = (keys + i) % nodes if i % 3 == 2 else np.full(len(keys), i // 2 % nodes)
            if first_of_node:
                kv.localize(keys[wanted == rank])
            kv.barrier()
            owner = wanted
            check_owner(owner, f"round {i}")
            check_pull_if_local(owner, pushed * workers, f"round {i}")
            kv.barrier()
            kv.push(keys, np.ones((len(keys), LENGTH), dtype=args.dtype))
            pushed += 1
            kv.barrier()
        checks.equal("rounds", pushed, rounds)
        values = np.empty((len(keys), LENGTH), dtype=args.dtype)
        kv.pull(keys, values)
        checks.that((values == rounds * workers).all(), f"the values are {values}, not {rounds * workers}")

        # is_finished: of what was done at once, and of what is on its way.
        here, away = keys[owner == rank], keys[owner != rank]
        buffer = np.full((len(here), LENGTH), -1, dtype=args.dtype)
        ts = kv.pull(here, buffer, True)
        if args.shared_memory:
            checks.that(kv.is_finished(ts), "a pull of local keys is not finished at once")
        kv.waitall()
        checks.that((buffer == rounds * workers).all(), "a pull of local keys gave wrong values")
        buffer = np.full((len(away), LENGTH), -1, dtype=args.dtype)
        ts = kv.pull(away, buffer, True)
        deadline = time.monotonic() + DEADLINE
        while not kv.is_finished(ts) and time.monotonic() < deadline:
            time.sleep(0.001)
        checks.that(kv.is_finished(ts), f"a pull was not finished after {DEADLINE} s")
        checks.that((buffer == rounds * workers).all(), "is_finished of a pull whose values are not there")
        kv.wait(ts)
        checks.that(kv.is_finished(ts), "a pull that was waited for is not finished")
        kv.barrier()                # from here on the keys move again
        ts = kv.localize(keys, True)
        kv.wait(ts)
        checks.that(kv.is_finished(ts), "a localize that was waited for is not finished")
        kv.waitall()

        # Empty key arrays are legal.
        none = np.empty(0, dtype=np.int64)
        nothing = np.empty((0, LENGTH), dtype=args.dtype)
        kv.localize(none)
        kv.pull(none, nothing)
        kv.push(none, nothing)
        checks.that(bool(kv.pull_if_local(none, nothing)), "pull_if_local of no keys is not true")
        checks.that(len(server.is_local(none)) == 0 and len(server.owner(none)) == 0, "no keys have an owner")

        # Localizes of keys that are here already, and duplicates.
        kv.barrier()
        if first_of_node and rank == nodes - 1:
            kv.localize(np.concatenate((keys, keys)))
            kv.localize(keys)
        kv.barrier()
        check_owner(np.full(len(keys), nodes - 1), "end")
        kv.barrier()

    return run_node(NAME, args, args.num_keys, LENGTH, work)


if __name__ == "__main__":
    run_program(main)
