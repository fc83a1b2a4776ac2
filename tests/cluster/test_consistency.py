"""Per-key sequential consistency of real nodes: a checked history of every worker, with operations in flight and keys that fly.

Number c of every value counts the pushes of worker c. Then a read is right if its own number is exactly what the reader has
pushed before it, if it is not older than an earlier read, and if all that anybody has read of a key forms a chain: of two
values one is at least as large in every number. The third is checked by worker 0 in the end, from files that the workers
write; Lapse tells them the folder, so all nodes have to be on one host or share it.

Two workloads. "mixed": every worker does everything. "race": on each node one worker (every second, if there are more) pushes and
pulls without waiting, and the others localize the same keys all the time. That is where a system that looks a key up and sends
later, in two steps, misses own pushes: 91 times in 15 million pulls in the C++ original.

    python tracker/dmlc_local.py -s 4 build/tests/test_consistency --pulls 10000000
"""
import os
import shutil
import tempfile
import threading
from collections import deque
from pathlib import Path

import numpy as np
from common import job_nodes, program_options, run_node

from lapse.options import positive_int
from lapse.program import run_program

NAME = "test_consistency"
PATH_LENGTH = 512       # bytes of the folder's name
FACES = ("c", "python")
WORKLOADS = ("mixed", "race")
# Percent of the calls, see _consistency.run.
PUSHER = {"push": 50, "localize": 0, "storm": 0, "in_place": 0, "if_local": 0, "sync": 0}
MOVER = {"push": 0, "localize": 100, "storm": 100, "in_place": 0, "if_local": 0, "sync": 0}


def parse(argv):
    parser = program_options(NAME, "Check the history of every worker for per-key sequential consistency.", dtype=None)
    parser.add_argument("--pulls", type=positive_int, default=None, metavar="N",
                        help="keys to read in the whole job; without it by --quick")
    parser.add_argument("-k", "--num_keys", type=positive_int, default=8, metavar="N", help="number of keys")
    parser.add_argument("--window", type=positive_int, default=32, metavar="N", help="operations of a worker in flight")
    parser.add_argument("--batch", type=positive_int, default=16, metavar="N", help="most keys of a call")
    parser.add_argument("--face", choices=FACES, default=FACES[0], help="the calls of the C level, or those of Python")
    parser.add_argument("--workload", choices=WORKLOADS, default=WORKLOADS[0],
                        help="see above; race needs the C level and two threads")
    parser.add_argument("--fault", action="append", default=[], metavar="NAME",
                        help="put in a bug of lapse.testing's, to see whether this run finds it; repeatable")
    parser.add_argument("--inject", default="", metavar="WHAT",
                        help="let channels be faulty: loss=P,double=P,reorder=P,delay=P, probabilities per message")
    parser.add_argument("--keep", type=positive_int, default=2_000_000, metavar="N",
                        help="most reads that a worker keeps for the comparison with the others'")
    parser.add_argument("--out", default="", metavar="FOLDER", help="folder for the reads; it is kept then")
    args = parser.parse_args(argv)
    if args.inject:
        from lapse.testing import injecting
        try:
            injecting.inject(injecting.parse(args.inject), seed=args.seed)
        except ValueError as error:
            parser.error(f"--inject {error}")
    if args.workload == "race" and (args.face != "c" or args.num_threads < 2):
        parser.error("--workload race needs --face c and two threads (-t) or more")
    return args


def run_python(kv, observer, reads, args, seed):
    """Do what the kernel does, with the calls of the Python face."""
    random = np.random.default_rng(seed)
    ones = np.zeros((args.batch, observer.workers), dtype=np.int64)
    ones[:, observer.me] = 1
    pending = deque()

    def settle():
        ts, keys, own, values = pending.popleft()
        kv.wait(ts)
        if keys is not None:
            observer.observe(keys, own, values)

    calls = issued = 0
    while issued < reads:
        keys = random.integers(args.num_keys, size=random.integers(1, args.batch + 1))
        dice = random.random()
        localize = 0.5 if (calls >> 6) % 8 == 7 else 0.04
        if dice < localize:
            pending.append((kv.localize(keys, True), None, None, None))
        elif dice < localize + 0.25:
            pending.append((kv.push(keys, ones[:len(keys)], True), None, None, None))
            np.add.at(observer.own, keys, 1)
        else:
            values = np.full((len(keys), observer.workers), -1, dtype=np.int64)
            own = observer.own[keys]
            if dice < localize + 0.30:
                if kv.pull_if_local(keys, values):
                    pending.append((-1, keys, own, values))
                    issued += len(keys)
            else:
                pending.append((kv.pull(keys, values, True), keys, own, values))
                issued += len(keys)
        calls += 1
        while len(pending) >= args.window:
            settle()
    while pending:
        settle()


def count_breaks(rows):
    """Return how many neighbours cannot be compared, once the rows are in the order of their sums; 0 if they form a chain."""
    rows = rows[np.argsort(rows.sum(axis=1, dtype=np.int64), kind="stable")]
    return int((rows[1:] < rows[:-1]).any(axis=1).sum())


def check_history(checks, folder, workers, num_keys, final):
    """Compare what all workers have read, and the final values with what they have pushed."""
    files = [np.load(folder / f"worker-{worker}.npz") for worker in range(workers)]
    pushed = np.stack([file["own"] for file in files], axis=1)
    checks.equal("wrong final counts:", int((final != pushed).sum()), 0)
    histories = [(file["keys"], file["rows"]) for file in files]
    breaks = compared = 0
    for key in range(num_keys):
        rows = np.concatenate([rows[keys == key] for keys, rows in histories] + [final[key:key + 1].astype(np.uint32)])
        compared += len(rows)
        breaks += count_breaks(rows)
    checks.equal("breaks in the order of all reads:", breaks, 0)
    reads = sum(int(file["reads"]) for file in files)
    checks.lines.append(f"job: {reads} reads checked, {compared} different ones compared, {pushed.sum()} pushes")


def main(argv=None):
    args = parse(argv)
    import _consistency  # late: --help needs no compiled module
    pulls = args.pulls or (40_000 if args.quick else 1_000_000)
    length = job_nodes(args.num_threads) * args.num_threads
    racers = -(-args.num_threads // 2)
    racing, changing = np.array([racers], dtype=np.int32), threading.Lock()     # pushers of this node that still race
    path_keys = args.num_keys + np.arange(-(-PATH_LENGTH // length))

    def tell_folder(kv):
        """Make the folder and write its name into the last keys, a byte per number."""
        folder = Path(args.out or tempfile.mkdtemp(prefix="lapse-consistency-")).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        name = os.fsencode(folder)
        if len(name) > PATH_LENGTH:
            raise ValueError(f"the name of the folder is longer than {PATH_LENGTH} bytes: {folder}")
        values = np.zeros((len(path_keys), length), dtype=np.int64)
        values.ravel()[:len(name)] = np.frombuffer(name, dtype=np.uint8)
        kv.set(path_keys, values)

    def ask_folder(kv):
        values = np.empty((len(path_keys), length), dtype=np.int64)
        kv.pull(path_keys, values)
        return Path(os.fsdecode(values.astype(np.uint8).tobytes().rstrip(b"\0")))

    def put_in_faults(server):
        if args.fault:
            from lapse.testing.simulation import fault_bits
            server._protocol.faults = fault_bits(args.fault)

    def work(kv, checks, me, workers, server):
        observer = _consistency.Observer(me, workers, args.num_keys, args.keep)
        reads = -(-pulls // workers)
        race = {}
        if args.workload == "race":
            mover = me % args.num_threads % 2
            race = {**MOVER, "racing": racing} if mover else PUSHER
            reads = 0 if mover else -(-pulls // (workers // args.num_threads * racers))
        kv.begin_setup()
        if me == 0:
            tell_folder(kv)
        kv.end_setup()
        folder = ask_folder(kv)
        if args.face == "python":
            run_python(kv, observer, reads, args, [args.seed, me])
        else:
            code = _consistency.run(kv, observer, reads, args.window, args.batch, args.seed * 65537 + me, **race)
            with changing:
                racing[0] -= "racing" not in race
            if code:
                raise server._error(code)
        kv.waitall()
        kv.barrier()

        final = np.full((args.num_keys, workers), -1, dtype=np.int64)
        kv.pull(np.arange(args.num_keys), final)
        checks.that((final[:, me] == observer.own).all(), f"own pushes {observer.own}, but the values say {final[:, me]}")
        where = f" (the first: key {observer.first_key})" if observer.first_key >= 0 else ""
        checks.that(observer.reads >= reads, f"only {observer.reads} of {reads} reads were checked")
        checks.equal(f"reads without exactly the own pushes{where}:", observer.missing, 0)
        checks.equal(f"reads that went back{where}:", observer.back, 0)
        keys, rows = observer.views()
        np.savez(folder / f"worker-{me}.npz", keys=keys, rows=rows, own=observer.own, reads=observer.reads)
        kv.barrier()
        if me == 0:
            try:
                check_history(checks, folder, workers, args.num_keys, final)
            finally:
                if not args.out:
                    shutil.rmtree(folder)

    return run_node(NAME, args, args.num_keys + len(path_keys), length, work, dtype="int64", phases=[put_in_faults])


if __name__ == "__main__":
    run_program(main)
