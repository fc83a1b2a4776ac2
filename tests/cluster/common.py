"""What the test programs share: their options, what a worker checks, and the life of a node."""
import math
import sys

import numpy as np

import lapse
from lapse.config import Config
from lapse.options import add_dtype, add_shared_memory, positive_int, program_parser, seed, system_settings
from lapse.program import run_workers

WRONG_PRINTED = 10      # per worker


def program_options(prog, description, *, threads=2, rounds=None, dtype="float32"):
    """Return a parser with the options of every test program.

    `rounds` are the iterations of a full and of a quick run; without them there is no `--num_iterations`, as there is no
    `--dtype` when `dtype` is None.
    """
    parser = program_parser(prog, description)
    parser.add_argument("-t", "--num_threads", type=positive_int, default=threads, metavar="N",
                        help="worker threads per process")
    if rounds is not None:
        parser.add_argument("-i", "--num_iterations", type=positive_int, default=None, metavar="N",
                            help=f"iterations; if not given {rounds[0]}, or {rounds[1]} with --quick")
        parser.set_defaults(rounds=rounds)
    parser.add_argument("--quick", action="store_true", help="a short run")
    parser.add_argument("--seed", type=seed, default=1, metavar="N", help="seed of what is random")
    add_shared_memory(parser)
    if dtype is not None:
        add_dtype(parser, dtype)
    return parser


def iterations(args):
    """Return how many iterations to run."""
    return args.num_iterations or args.rounds[args.quick]


def job_nodes(num_threads):
    """Return the number of nodes, before there is a Server to ask."""
    return Config.make(1, num_threads).num_nodes


def fits(counts, shares, z=5.2):
    """Pearson's chi-square test: can these counts come from independent draws with these shares?

    `z` bounds the error of rejecting what is right, in standard deviations (3.7: one in 10,000; 5.2: one in 10,000,000). Neighbouring
    cells are put together until at least 5 are expected in each. The quantile is Wilson's and Hilferty's (1931). What has a share of 0 may
    not occur at all.
    """
    counts, shares = np.asarray(counts, np.float64), np.asarray(shares, np.float64)
    if counts[shares == 0].any():
        return False
    if np.count_nonzero(shares) == 1:
        return True
    expected = shares * (counts.sum() / shares.sum())
    starts, room = [0], 0.0
    for i, more in enumerate(expected):
        if room >= 5:
            starts.append(i)
            room = 0.0
        room += more
    if room < 5 and len(starts) > 1:
        starts.pop()
    counts, expected = np.add.reduceat(counts, starts), np.add.reduceat(expected, starts)
    if len(counts) < 2:
        raise ValueError("there is nothing to compare: too few draws")
    freedom = len(counts) - 1
    statistic = ((counts - expected)**2 / expected).sum()
    spread = 2 / (9 * freedom)
    return (statistic / freedom)**(1 / 3) <= 1 - spread + z * math.sqrt(spread)


def shares_of(distribution, span):
    """Return the shares of `span` keys in "uniform" or "log-uniform"."""
    first = np.arange(1, span + 1)
    return np.full(span, 1 / span) if distribution == "uniform" else np.log1p(1 / first) / np.log(span + 1)


class Checks:
    """What one worker has checked, and the lines that it wants printed."""

    def __init__(self):
        self.count = 0
        self.wrong = []
        self.lines = []

    def that(self, right, what):
        """Count a check; `what` tells what is wrong if it does not hold."""
        self.count += 1
        if not right:
            self.wrong.append(what)

    def equal(self, name, value, expected):
        """Count a check of a number, and have it printed."""
        right = value == expected
        self.that(right, f"{name} {value} but expected {expected}")
        if right:
            self.lines.append(f"{name} {value} = expected {expected}")


def run_node(name, args, num_keys, lengths, work, *, phases=None, **server_settings):
    """Run one process of the job and return its exit code.

    phases: functions of the Server, called one after the other before workers are made; each time the workers run, and are finalized.
    (If not given, they run once.)

    `work(kv, checks, me, workers, server)` runs in a thread per worker; `me` counts the workers over all nodes. The numbers it
    checks are printed when all is done, then one closing line per node. A worker that has checked nothing is wrong, too.
    """
    lapse.setup(num_keys, args.num_threads, **system_settings(args))
    if lapse.is_scheduler():
        lapse.scheduler(num_keys, args.num_threads)
        return 0
    server = lapse.Server(lengths, **({"dtype": args.dtype} | server_settings if "dtype" in args else server_settings))
    rank, nodes = server.my_rank(), server.num_nodes

    def run_worker(worker):
        kv = lapse.Worker(worker, server)
        checks = Checks()
        work(kv, checks, rank * args.num_threads + worker, nodes * args.num_threads, server)
        kv.finalize()
        return checks

    results = []
    for phase in phases or [lambda server: None]:
        phase(server)
        server.barrier()        # of the nodes' main threads
        results += run_workers(args.num_threads, run_worker)
        server.barrier()
    server.shutdown()

    lines = []
    for number, checks in enumerate(results):
        worker = number % args.num_threads
        if not checks.count:
            checks.wrong.append("nothing was checked")
        lines += [f"node {rank} worker {worker}: {line}" for line in checks.lines]
        lines += [f"node {rank} worker {worker}: WRONG: {what}" for what in checks.wrong[:WRONG_PRINTED]]
    wrong = sum(len(checks.wrong) for checks in results)
    count = sum(checks.count for checks in results)
    lines.append(f"node {rank} {name}: {'WRONG' if wrong else 'OK'} ({nodes} nodes x {args.num_threads} workers, "
                 f"{count} checks, {wrong} wrong)")
    sys.stdout.writelines(line + "\n" for line in lines)
    return 1 if wrong else 0
