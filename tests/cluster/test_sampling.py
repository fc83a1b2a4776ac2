"""Sampling: each scheme hands out what its guarantee says, from several workers and nodes at once.

    python tracker/dmlc_local.py -s 3 build/tests/test_sampling -t 4

The values are set to their keys, so that every pulled sample can be checked. Each scheme runs in a phase of its own, with each
distribution; pool with the options `--sampling.reuse` and `--sampling.postpone`, which are 3 and true here if not given.
"""
import threading

import numpy as np
from common import fits, iterations, program_options, run_node, shares_of

from lapse.options import positive_int, sampling_settings
from lapse.program import run_program

NAME = "test_sampling"
SCHEMES = ("naive", "preloc", "pool", "local")
DISTRIBUTIONS = ("uniform", "log-uniform", "weights", "function")
LENGTH = 2
DRAWS = 1000            # of a worker, per iteration
AHEAD = 5               # samples prepared ahead
UNDER_WAY = 64          # groups of a pool that may be on their way at once


def schemes(text):
    """Convert `a,b` to a list of schemes."""
    words = text.split(",")
    wrong = [word for word in words if word not in SCHEMES]
    if wrong:
        raise ValueError(wrong)
    return words


def parse(argv):
    parser = program_options(NAME, "Workers draw samples by every scheme, and check them against the distribution.", rounds=(20, 4))
    parser.add_argument("-k", "--num_keys", type=positive_int, default=300, metavar="N", help="number of parameters")
    parser.add_argument("--schemes", type=schemes, default=",".join(SCHEMES), metavar="LIST", help="schemes to run")
    parser.set_defaults(sampling_reuse=3, sampling_postpone=True, sampling_group_size=100)
    return parser.parse_args(argv)


def weights_of(span):
    """Return weights of very different sizes, every fifth of them 0."""
    weights = np.random.default_rng(7).random(span)**3
    weights[::5] = 0
    return weights if weights.any() else np.ones(span)


def start_anew(node):
    """Have sampling not enabled, in a node whose Workers have all gone: programs enable it once, this one in each phase."""
    node.stop_sampling()
    node.sampling = node.filler = node.filler_thread = None
    node.had_workers = False


class Phase:
    """One scheme with one distribution: how it is enabled, and what the workers of this node share."""

    def __init__(self, args, scheme, name):
        self.args, self.scheme, self.name = args, scheme, name
        self.low, self.high = (0, args.num_keys) if args.num_keys < 4 else (1, args.num_keys - 1)
        span = self.high - self.low
        weights = weights_of(span)
        self.distribution = {"weights": weights, "function": self.draw}.get(name, name)
        self.shares = shares_of(name, span) if name in ("uniform", "log-uniform") else weights / weights.sum()
        self.lock = threading.Lock()
        self.drawn = []             # of this node's workers

    def draw(self, rng, n):
        return rng.choice(np.arange(self.low, self.high), n, p=self.shares)

    def __call__(self, server):
        global phase
        phase = self
        start_anew(server._node)
        settings = {**sampling_settings(self.args), "scheme": self.scheme, "seed": self.args.seed}
        server.enable_sampling_support(distribution=self.distribution, min=self.low, max=self.high, **settings)


phase: Phase


def main(argv=None):
    args = parse(argv)
    rounds = iterations(args)
    every = np.arange(args.num_keys)
    values = np.repeat(every, LENGTH).reshape(-1, LENGTH).astype(args.dtype)

    def work(kv, checks, me, workers, server):
        """One worker in one phase."""
        worker = me % args.num_threads
        what = f"{phase.scheme} {phase.name}"
        if me == 0:
            kv.set(every, values)
        kv.barrier()
        if worker == 0:                     # parameters lie anywhere, but every node has some
            kv.localize(every[every % server.num_nodes == server.my_rank()])
        kv.begin_setup()
        kv.end_setup()
        if phase.scheme == "local":
            check_local(kv, checks, server, what)
        drawn = draw_samples(kv, checks, what)
        checks.equal(f"{what}: draws", len(drawn), rounds * DRAWS)
        if phase.scheme != "local":         # (its keys stay where they are, and it has been checked)
            with phase.lock:
                phase.drawn.append(drawn)
            if phase.scheme != "pool":
                checks.that(follows(drawn, phase.shares), f"{what}: the draws do not follow the distribution")
        check_refusals(kv, checks, what)
        kv.waitall()
        kv.barrier()
        if worker == 0:
            check_node(checks, server, what)
        kv.barrier()

    def counted(keys):
        return np.bincount(keys - phase.low, minlength=phase.high - phase.low)

    def follows(keys, shares, reuse=1):
        """Tell whether the draws can be independent ones; true of those without replacement, which are not."""
        return not args.sampling_with_replacement or fits(counted(keys) / reuse, shares)

    def draw_samples(kv, checks, what):
        """Samples prepared ahead and pulled in pieces, half of them asynchronously; returns their keys."""
        drawn = []
        for i in range(rounds):
            prepared = [kv.prepare_sample(DRAWS // AHEAD) for _ in range(AHEAD)]
            for sample in prepared:
                keys = np.full(DRAWS // AHEAD, -1)
                vals = np.full((DRAWS // AHEAD, LENGTH), -1, dtype=args.dtype)
                for at in range(0, len(keys), 80):
                    kv.wait(kv.pull_sample(sample, keys[at:at + 80], vals[at:at + 80], i % 2 == 0))
                inside = keys.min() >= phase.low and keys.max() < phase.high
                checks.that(inside, f"{what}: drew a key outside of [{phase.low}, {phase.high})")
                checks.that((vals == values[keys]).all() if inside else True, f"{what}: the values are not those of the keys")
                if not args.sampling_with_replacement:
                    checks.that(len(np.unique(keys)) == len(keys), f"{what}: drew a key twice")
                drawn.append(keys)
            kv.finish_sample(kv.prepare_sample(50))         # one that is not used
        return np.concatenate(drawn)

    def check_local(kv, checks, server, what):
        """Check that only local keys are drawn, in their proportion, and that nothing is sent for them."""
        here = np.asarray(server.is_local(every))[phase.low:phase.high]
        if np.count_nonzero(phase.shares * here) < (1 if args.sampling_with_replacement else DRAWS // AHEAD):
            draw_samples(kv, checks, what)      # it falls back for want of local keys
            kv.barrier()
            checks.that(server.stats().sample_fallbacks > 0, f"{what}: no draw fell back, but {here.sum()} keys are local")
            kv.barrier()
            return
        before = server.stats()
        drawn = draw_samples(kv, checks, what)
        kv.barrier()
        after = server.stats()
        checks.that(here[drawn - phase.low].all(), f"{what}: drew keys that are not local")
        checks.that(follows(drawn, phase.shares * here), f"{what}: the draws do not follow the distribution among the local keys")
        if args.shared_memory and args.num_keys >= 4 * server.num_nodes:       # else others ask for what they do not have
            checks.that(after.sent_messages == before.sent_messages, f"{what}: sent {after.sent_messages - before.sent_messages} messages")
        checks.that(after.sample_fallbacks == 0, f"{what}: {after.sample_fallbacks} draws were not local")
        kv.barrier()

    def check_refusals(kv, checks, what):
        keys = np.empty(11, np.int64)
        sample = kv.prepare_sample(10)
        for wrong in (lambda: kv.pull_sample(sample, keys), lambda: kv.pull_sample(sample + 12345, keys[:1])):
            try:
                wrong()
            except ValueError:
                checks.that(True, "")
            else:
                checks.that(False, f"{what}: a sample that cannot be was pulled")
        kv.finish_sample(sample)

    def check_node(checks, server, what):
        """What the workers of this node have done together."""
        stats = server.stats()
        total = args.num_threads * rounds * DRAWS * (2 if phase.scheme == "local" else 1)
        checks.equal(f"{what}: draws of the node", stats.sampled, total)
        if phase.scheme == "pool":
            # each draw counts `reuse` times
            reuse, group = args.sampling_reuse, args.sampling_group_size
            checks.that(follows(np.concatenate(phase.drawn), phase.shares, reuse), f"{what}: the draws do not follow the distribution")
            ready = stats.pool_refills * group * reuse
            ahead = 2 * UNDER_WAY * group * reuse
            checks.that(total - ahead <= ready <= total + ahead, f"{what}: {stats.pool_refills} groups came for {total} draws")
            # (those under way when the statistics started anew had been localized before)
            checks.that(stats.localized.total >= (stats.pool_refills - UNDER_WAY) * group,
                        f"{what}: {stats.localized.total} keys were localized for {stats.pool_refills} groups")
        elif phase.scheme == "preloc":
            checks.that(stats.localized.total >= total, f"{what}: {stats.localized.total} keys were localized for {total} draws")
        else:
            checks.that(stats.localized.total == stats.pool_refills == 0, f"{what}: keys were localized")

    phases = [Phase(args, scheme, name) for scheme in args.schemes for name in DISTRIBUTIONS]
    return run_node(NAME, args, args.num_keys, LENGTH, work, phases=phases)


if __name__ == "__main__":
    run_program(main)
