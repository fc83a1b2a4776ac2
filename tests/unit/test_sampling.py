"""Sampling on one node: distributions, handles, the four schemes, every error; and what needs more nodes, in small."""
import gc
import threading
import weakref

import numpy as np
import pytest

import lapse
from lapse.options import program_parser, sampling_settings
from tests.cluster.common import fits, shares_of
from tests.unit import sampling_probe

ERR_NO_SAMPLING, ERR_SAMPLE, ERR_SAMPLE_COUNT, ERR_DRAW = -12, -13, -14, -15       # as in _types.pxd
SCHEMES = ["naive", "preloc", "pool", "local"]
Z = 3.72                                # one in 10,000, with fixed seeds
K = 50


@pytest.fixture
def sampler(serve):
    """sampler(scheme, ..., threads=, num_keys=) -> (server, Worker) whose values are their keys; the Worker is finalized afterwards."""
    workers = []

    def make(scheme="naive", *arguments, num_keys=K, length=2, seed=1, threads=1, shared_memory=True, **settings):
        server = serve(length, num_keys=num_keys, threads=threads, shared_memory=shared_memory, dtype="float64")
        server.enable_sampling_support(scheme, *arguments, seed=seed, **settings)
        workers.append(lapse.Worker(0, server))
        if isinstance(length, int):
            workers[0].set(range(num_keys), np.repeat(np.arange(num_keys, dtype=float), length))
        return server, workers[0]

    yield make
    for kv in workers:
        if "finalized" not in repr(kv):
            with kv:
                pass


def pulled(kv, n, piece=1000):
    """n draws, through pull_sample; each value is checked."""
    sample = kv.prepare_sample(n)
    keys = np.empty(n, np.int64)
    vals = np.full((n, 2), -1.0)
    for at in range(0, n, piece):
        assert kv.pull_sample(sample, keys[at:at + piece], vals[at:at + piece]) == -1
    assert (vals == keys[:, None]).all()
    return keys


def counted(keys, low=0, high=K):
    assert keys.min() >= low and keys.max() < high
    return np.bincount(keys - low, minlength=high - low)


# --- the test of the tests

def test_what_does_not_fit_is_seen():
    rng = np.random.default_rng(1)
    draws = rng.integers(0, K, 20_000)
    assert fits(np.bincount(draws, minlength=K), np.ones(K), Z)
    assert not fits(np.bincount(np.where(draws == 7, 8, draws), minlength=K), np.ones(K), Z)            # "the next one upwards"
    assert not fits(np.bincount(np.where(rng.random(20_000) < 0.03, 3, draws), minlength=K), np.ones(K), Z)
    assert not fits(np.bincount(draws, minlength=K) * 3, np.ones(K), Z)                                 # repeated, counted as if it was not
    assert not fits(np.bincount(draws, minlength=K), np.arange(K), Z)                                   # has a share of 0
    with pytest.raises(ValueError, match="nothing to compare"):
        fits([3, 4], [1, 1])
    assert fits([30, 0], [1, 0]) and not fits([30, 1], [1, 0])


# --- distributions

WEIGHTS = np.random.default_rng(5).random(K)**4 * (np.arange(K) % 7 > 0)       # every seventh key is never drawn


def by_function(rng, n):
    return rng.choice(K, n, p=WEIGHTS / WEIGHTS.sum())


DISTRIBUTIONS = {"uniform": ("uniform", np.ones(K)), "log-uniform": ("log-uniform", shares_of("log-uniform", K)),
                 "weights": (WEIGHTS, WEIGHTS), "list": ([0] * 48 + [3, 1], np.array([0] * 48 + [3, 1])), "function": (by_function, WEIGHTS)}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_draws_follow_the_distribution(sampler, scheme, name):
    distribution, shares = DISTRIBUTIONS[name]
    server, kv = sampler(scheme, True, distribution)
    assert fits(counted(pulled(kv, 20_000, 7)), shares, Z)
    assert fits(counted(sampling_probe.draw(kv, 20_000, 64)), shares, Z)
    stats = server.stats()
    assert stats.sampled == 40_000
    assert stats.sample_fallbacks == stats.sample_postponed == 0
    assert (stats.pool_refills * 250 >= 40_000) == (scheme == "pool")


@pytest.mark.parametrize("distribution", ["uniform", "log-uniform", np.arange(1, 11)])
def test_a_range(sampler, distribution):
    _, kv = sampler("naive", True, distribution, 20, 30)
    shares = np.arange(1, 11) if not isinstance(distribution, str) else shares_of(distribution, 10)
    assert fits(counted(pulled(kv, 20_000), 20, 30), shares, Z)


@pytest.mark.parametrize("span", [1, 2, 3, 1000])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_ends_of_a_range(sampler, scheme, span):
    _, kv = sampler(scheme, True, "log-uniform", 5, 5 + span, num_keys=1010)
    keys = sampling_probe.draw(kv, 50_000, 100)
    assert keys.min() == 5 and keys.max() <= 4 + span
    assert len(np.unique(keys)) == span or span == 1000


def test_weights_of_every_size(sampler):
    """An alias table of 32-bit thresholds: tiny weights are drawn, and none of 0, in whatever order they come."""
    weights = np.zeros(3000)
    weights[::3] = 10.0 ** -(np.arange(1000) % 8)
    _, kv = sampler("naive", True, weights, num_keys=3000)
    keys = sampling_probe.draw(kv, 400_000, 1000)
    counts = np.bincount(keys, minlength=3000)
    assert fits(counts, weights, Z)
    by_size = np.bincount(np.arange(1000) % 8, counts[::3])
    assert fits(by_size, 10.0 ** -np.arange(8), Z)


def test_a_tensor_of_weights(sampler):
    torch = pytest.importorskip("torch")
    _, kv = sampler("naive", True, torch.tensor(WEIGHTS))
    assert fits(counted(pulled(kv, 20_000)), WEIGHTS, Z)


# --- seeds

@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("distribution", ["log-uniform", by_function])
def test_a_seed_repeats_the_draws(serve, scheme, distribution):
    def run(seed):
        with serve(2, num_keys=K, threads=2) as server:
            server.enable_sampling_support(scheme, True, distribution, seed=seed)
            workers = [lapse.Worker(label, server) for label in ((0, 0) if seed == 4 else (0, 1))]
            drawn = []
            for kv in workers:          # the draws of a pool come in one order: who gets them depends on who asks
                drawn.append(kv.pull_sample(kv.prepare_sample(0), np.empty(0, np.int64)) * 0)
                keys = np.empty(200, np.int64)
                kv.pull_sample(kv.prepare_sample(200), keys)
                drawn[-1] = keys.tolist()
            del workers, kv
            return drawn

    first = run(3)
    assert first == run(3)
    assert first[0] != first[1]         # each worker has its own
    other = run(4)                      # also with equal labels
    assert other[0] != other[1]
    assert first[0] != other[0]
    assert run(None) != run(None)


# --- handles

@pytest.mark.parametrize("scheme", SCHEMES)
def test_many_handles_at_once(sampler, scheme):
    server, kv = sampler(scheme)
    samples = [kv.prepare_sample(n % 40) for n in range(3000)]
    assert len(set(samples)) == 3000
    one = np.empty(1, np.int64)
    for n, sample in enumerate(samples):
        if n % 40:
            kv.pull_sample(sample, one)
    for sample in samples[::2]:
        kv.finish_sample(sample)
        kv.finish_sample(sample)
    rest = 0
    for n, sample in enumerate(samples):
        left = max(n % 40 - 1, 0)
        keys = np.empty(left, np.int64)
        if n % 2 == 0 and left:
            with pytest.raises(ValueError, match=f"sample {sample} has 0 draws left, not {left}"):
                kv.pull_sample(sample, keys)
        else:
            kv.pull_sample(sample, keys)
            rest += left
    assert server.stats().sampled == rest + sum(n % 40 > 0 for n in range(3000))
    for sample in samples:              # all have been closed, and their numbers do not come again
        kv.finish_sample(sample)
    assert not set(samples) & {kv.prepare_sample(1) for _ in range(3000)}


def test_closed_handles_give_their_memory_back(sampler):
    import resource
    _, kv = sampler("preloc")
    for _ in range(3):
        kv.finish_sample(kv.prepare_sample(1_000_000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(300):
        kv.finish_sample(kv.prepare_sample(100_000))
        pulled(kv, 100)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000      # KiB


@pytest.mark.parametrize("scheme", SCHEMES)
def test_more_than_prepared(sampler, scheme):
    server, kv = sampler(scheme)
    sample = kv.prepare_sample(10)
    keys, vals = np.full(11, -7), np.zeros((11, 2))
    with pytest.raises(ValueError, match=f"sample {sample} has 10 draws left, not 11"):
        kv.pull_sample(sample, keys, vals)
    assert (keys == -7).all() and server.stats().sampled == 0
    kv.pull_sample(sample, keys[:4], vals[:4])
    with pytest.raises(ValueError, match=f"sample {sample} has 6 draws left, not 7"):
        kv.pull_sample(sample, keys[4:], vals[4:])
    kv.pull_sample(sample, keys[4:10], vals[4:10])
    assert (vals[:10] == keys[:10, None]).all() and keys[10] == -7
    with pytest.raises(ValueError, match=f"sample {sample} has 0 draws left, not 1"):
        kv.pull_sample(sample, keys[10:], vals[10:])
    kv.pull_sample(sample, keys[:0], vals[:0])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_unknown_handles(sampler, scheme):
    _, kv = sampler(scheme)
    kv.prepare_sample(5)
    for unknown in (1, -1, 77, 2**24, 2**40, 2**63 - 1, -2**63, 2**70):
        with pytest.raises(ValueError, match=f"sample {unknown}: this Worker never prepared it"):
            kv.pull_sample(unknown, np.empty(1, np.int64))
        with pytest.raises(ValueError, match=f"sample {unknown}: this Worker never prepared it"):
            kv.finish_sample(unknown)
    with pytest.raises(TypeError, match="a sample is an int, not str"):
        kv.pull_sample("0", np.empty(1, np.int64))


@pytest.mark.parametrize("n", [-1, 2**32, 2**70])
def test_wrong_numbers_of_draws(sampler, n):
    _, kv = sampler()
    with pytest.raises((ValueError, OverflowError)):
        kv.prepare_sample(n)
    with pytest.raises(TypeError, match="number of draws must be an int"):
        kv.prepare_sample(2.5)


def test_clocks_are_accepted(sampler):
    _, kv = sampler()
    keys = np.empty(3, np.int64)
    kv.pull_sample(kv.prepare_sample(3, 7, 9), keys)
    kv.pull_sample(kv.prepare_sample(3, start=7, end=9), keys)


def test_codes_at_c_level(sampler):
    _, kv = sampler()
    sample = sampling_probe.prepare(kv, 3)
    assert sampling_probe.codes(kv, sample, 4) == (ERR_SAMPLE_COUNT, ERR_SAMPLE_COUNT, 0)
    assert sampling_probe.codes(kv, sample, 1) == (ERR_SAMPLE_COUNT, ERR_SAMPLE_COUNT, 0)
    assert sampling_probe.codes(kv, sampling_probe.prepare(kv, 3), 1) == (0, -1, 0)
    assert sampling_probe.codes(kv, 99, 1) == (ERR_SAMPLE, ERR_SAMPLE, ERR_SAMPLE)
    assert sampling_probe.prepare(kv, -1) == ERR_SAMPLE_COUNT
    assert sampling_probe.codes(kv, sampling_probe.prepare(kv, 3), -1)[0] == ERR_SAMPLE_COUNT


# --- without replacement

@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("distribution", ["uniform", "log-uniform", WEIGHTS + 1e-9])
@pytest.mark.parametrize("n", [1, 20, K])
def test_without_replacement(sampler, scheme, distribution, n):
    _, kv = sampler(scheme, False, distribution, group_size=20, reuse=3)
    for piece in (1, 7, K):
        keys = pulled(kv, n, piece)
        assert len(np.unique(keys)) == n
        keys = sampling_probe.draw(kv, n, piece)
        assert len(np.unique(keys)) == n and keys.max() < K


@pytest.mark.parametrize("scheme", ["naive", "preloc", "local"])
@pytest.mark.parametrize("n", [2, 4])
def test_the_order_without_replacement(sampler, scheme, n):
    """Of four keys: every ordered outcome has the probability of drawing them one after the other. With n = 4 the last ones come through order_rest."""
    weights = np.array([1000.0, 30.0, 3.0, 1.0])
    _, kv = sampler(scheme, False, weights, 0, 4)
    counts = np.zeros((4, 4))
    for _ in range(10_000):
        keys = sampling_probe.draw(kv, n, 2)
        counts[keys[n - 2], keys[n - 1]] += 1
    shares = np.zeros((4, 4))

    def walk(drawn, share):
        if len(drawn) == n:
            shares[drawn[-2], drawn[-1]] += share
            return
        left = weights.sum() - weights[list(drawn)].sum()
        for key in set(range(4)) - set(drawn):
            walk((*drawn, key), share * weights[key] / left)
    walk((), 1.0)
    assert fits(counts.ravel(), shares.ravel(), Z)


def test_more_different_keys_than_there_are(sampler):
    _, kv = sampler("naive", False, WEIGHTS)
    there = np.count_nonzero(WEIGHTS)
    assert len(np.unique(pulled(kv, there))) == there
    with pytest.raises(ValueError, match=f"{there + 1} different keys cannot be drawn: there are {there}"):
        kv.prepare_sample(there + 1)


def test_a_function_that_repeats_itself(sampler):
    _, kv = sampler("naive", False, lambda rng, n: np.full(n, 3), batch_size=200_000)
    with pytest.raises(ValueError, match="had drawn before"):
        pulled(kv, 2)


# --- callables

@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("function", "error", "text"), [
    (lambda rng, n: np.zeros(n - 1, np.int64), ValueError, "must give 500 keys, not an array of shape"),
    (lambda rng, n: np.zeros((n, 1), np.int64), ValueError, "must give 500 keys"),
    (lambda rng, n: np.zeros(n), TypeError, "array of ints, not of float64"),
    (lambda rng, n: np.full(n, K), lapse.KeyRangeError, rf"drawn key {K}, which is not in \[0, {K}\)"),
    (lambda rng, n: np.full(n, -1), lapse.KeyRangeError, "drawn key -1"),
    (lambda rng, n: 1 / 0, ZeroDivisionError, "division"),
    (lambda rng: None, TypeError, "positional argument"),
])
def test_a_function_that_fails(sampler, scheme, function, error, text):
    _, kv = sampler(scheme, True, function, batch_size=500)
    for _ in range(2):
        with pytest.raises(error, match=text):
            pulled(kv, 5)
    code = sampling_probe.draw(kv, 5, 5)
    assert code == ERR_DRAW
    kv.signal = None


def test_a_function_is_called_for_batches(sampler):
    calls = []

    def function(rng, n):
        calls.append((n, type(rng)))
        return np.arange(n, dtype=np.int32) % K

    _, kv = sampler("naive", True, function, batch_size=100)
    assert pulled(kv, 250, 7).tolist() == [i % 100 % K for i in range(250)]
    assert calls == [(100, np.random.Generator)] * 3


# --- preloc

def test_preloc_draws_when_prepared(sampler):
    server, kv = sampler("preloc", True, "uniform")
    samples = [kv.prepare_sample(30) for _ in range(20)]
    assert server.stats().localized.total == 600
    assert server.stats().sampled == 0
    keys = [np.empty(30, np.int64) for _ in samples]
    for sample, room in zip(reversed(samples), reversed(keys), strict=True):        # in whatever order the samples are used
        kv.pull_sample(sample, room[:11])
        kv.pull_sample(sample, room[11:])
    drawn = np.concatenate(keys).tolist()
    with serve_again(server, kv, "preloc") as (_, again):
        assert np.concatenate([pulled(again, 30) for _ in range(20)]).tolist() == drawn


class serve_again:
    """The same settings, from the start."""

    def __init__(self, server, kv, scheme):
        kv.finalize()
        server.shutdown()
        lapse.setup(K, 1)
        self.server = lapse.Server(2, dtype="float64")
        self.server.enable_sampling_support(scheme, seed=1)
        self.kv = lapse.Worker(0, self.server)
        self.kv.set(range(K), np.repeat(np.arange(K, dtype=float), 2))

    def __enter__(self):
        return self.server, self.kv

    def __exit__(self, *error):
        self.kv.finalize()
        self.server.shutdown()


def test_preloc_does_not_wait_for_credit(sampler):
    """With all operations under way taken up, it prepares all the same."""
    _, kv = sampler("preloc", shared_memory=False)
    for _ in range(3000):
        kv.prepare_sample(3)
    assert len(pulled(kv, 1000)) == 1000


# --- pool

def test_the_pool_hands_out_each_draw_reuse_times(sampler):
    server, kv = sampler("pool", True, "uniform", num_keys=100_000, group_size=100, reuse=3)
    keys = np.concatenate([sampling_probe.draw(kv, 300, 7) for _ in range(50)])
    groups = keys.reshape(50, 300)
    for group in groups:                # draws of a group stay together: reuse times each, and not one after the other
        assert (np.unique(group, return_counts=True)[1] % 3 == 0).all()
        assert len(np.unique(group)) > 95
        assert (group[1:] == group[:-1]).mean() < 0.1
    assert (np.sort(groups, axis=1)[:-1] != np.sort(groups, axis=1)[1:]).any()
    assert 50 <= server.stats().pool_refills < 50 + 64 + 64


@pytest.mark.parametrize("postpone", [False, True])
def test_eight_threads_get_each_use_once(serve, postpone):
    """Each draw of 600 groups comes exactly `reuse` times to one of eight threads, over many handles of any size."""
    threads, group, reuse, groups = 8, 50, 3, 600
    server = serve(1, num_keys=1_000_000, threads=threads)
    server.enable_sampling_support("pool", group_size=group, reuse=reuse, postpone=postpone, seed=9)
    total = groups * group * reuse
    drawn = []

    def work(index):
        kv = lapse.Worker(index, server)
        rng = np.random.default_rng(index)
        mine, left = [], (total - 1000) // threads
        while left:
            n = min(left, int(rng.integers(1, 200)))
            mine.append(sampling_probe.draw(kv, n, int(rng.integers(1, 50))))
            left -= n
            if rng.random() < 0.1:      # takes from the pool, and gives back
                kv.finish_sample(kv.prepare_sample(10))
        drawn.extend(mine)

    run_all(work, threads)
    gc.collect()
    with lapse.Worker(99, server) as kv:        # what the others took and did not use is handed out now
        rest = total - sum(map(len, drawn))
        assert rest >= 1000
        drawn.append(sampling_probe.draw(kv, rest, 10))
        for index in range(1, threads):
            server._node.cluster.retire(server._node.member(index))
    counts = np.unique(np.concatenate(drawn), return_counts=True)[1]
    assert counts.sum() == total
    assert (counts % reuse == 0).all()
    assert len(counts) > 0.98 * groups * group


def run_all(work, threads):
    failures = []

    def run(index):
        try:
            work(index)
        except BaseException as error:
            failures.append(error)
    running = [threading.Thread(target=run, args=(index,)) for index in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if failures:
        raise failures[0]


def test_the_pool_waits_with_a_limit(sampler):
    """An empty pool: the callable is held up. Nothing is drawn when the time is up, and everything comes later."""
    go = threading.Event()

    def slow(rng, n):
        go.wait(60)
        return np.arange(n) % K

    server, kv = sampler("pool", True, slow, group_size=10, reuse=2, batch_size=1000)
    sample = kv.prepare_sample(15)
    keys = np.empty(15, np.int64)
    for _ in range(2):
        with pytest.raises(TimeoutError, match="nothing was drawn: the pool is empty"):
            kv.pull_sample(sample, keys, timeout=0.02)
    assert server.stats().pool_waits == 2 and server.stats().sampled == 0
    go.set()
    kv.pull_sample(sample, keys)
    assert server.stats().sampled == 15
    with pytest.raises(ValueError, match="has 0 draws left"):
        kv.pull_sample(sample, keys[:1])


def test_shutdown_ends_a_wait_for_the_pool(serve):
    server = serve(2, num_keys=K, threads=1)
    never = threading.Event()
    server.enable_sampling_support("pool", True, lambda rng, n: (never.wait(5), np.zeros(n, np.int64))[1], batch_size=100)
    ended = []

    def work():
        kv = lapse.Worker(0, server)
        try:
            kv.pull_sample(kv.prepare_sample(1), np.empty(1, np.int64))
        except RuntimeError as error:
            ended.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    while not server.stats().pool_waits:
        pass
    threading.Timer(0.2, never.set).start()
    server.shutdown()
    thread.join(30)
    assert not thread.is_alive()
    assert not ended or "shut down" in ended[0]
    assert not [t for t in threading.enumerate() if t.name == "lapse-sampling"]


def test_the_pool_ends_with_a_dropped_server(deadline, serve):
    lapse.setup(K, 1)
    server = lapse.Server(2)
    server.enable_sampling_support("pool")
    kv = lapse.Worker(0, server)
    pulled_keys = np.empty(1000, np.int64)
    kv.pull_sample(kv.prepare_sample(1000), pulled_keys)
    node, server = weakref.ref(server), server._node
    del kv
    server, ended = None, server.ended
    gc.collect()
    assert node() is None
    assert ended.wait(30)
    assert not [t for t in threading.enumerate() if t.name == "lapse-sampling"]


# --- local

def test_local_keys_alone(serve):
    """One node of one: all is local, and nothing is sent for it."""
    server = serve(2, num_keys=K, shared_memory=True)
    server.enable_sampling_support("local", seed=2)
    with lapse.Worker(0, server) as kv:
        before = server.stats().received_messages
        keys = np.empty(1000, np.int64)
        kv.pull_sample(kv.prepare_sample(1000), keys)
        stats = server.stats()
    assert (stats.received_messages, stats.pulled.local, stats.pulled.remote) == (before, 1000, 0)


LOCAL = """
    import numpy as np, lapse
    from tests.cluster.common import fits, shares_of
    from tests.unit import sampling_probe
    K, FEW = 20_000, 40
    rank_0_has = {has}
    lapse.setup(K, 1)
    server = lapse.Server(1, dtype="int64")
    rng = np.random.default_rng(3)
    distribution = {distribution}
    server.enable_sampling_support("local", {replacement}, distribution, seed=1)
    kv = lapse.Worker(0, server)
    rank = server.my_rank()
    if rank == 0:
        kv.set(range(K), np.arange(K))
    kv.barrier()
    if rank == 1:
        kv.localize(np.arange(K))
    kv.barrier()
    shares = shares_of(distribution, K) if isinstance(distribution, str) else distribution / np.sum(distribution)
    if rank == 0:
        for count in rank_0_has:
            some = rng.permutation(K)[:count]
            kv.localize(some)
            local = server.is_local(np.arange(K))
            before = server.stats()
            {body}
            after = server.stats()
            assert after.sent_messages == before.sent_messages, (before, after)
            assert after.sample_fallbacks == before.sample_fallbacks
    kv.barrier()
    kv.finalize()
    server.shutdown()
    """

DRAWS = """
            drawn = [sampling_probe.draw(kv, 50, 50) for _ in range(400)]
            keys, vals = np.empty(10, np.int64), np.empty(10, np.int64)
            for _ in range(200):
                kv.pull_sample(kv.prepare_sample(10), keys, vals)
                assert (keys == vals).all()
                drawn.append(keys.copy())
            drawn = np.concatenate(drawn)
            assert local[drawn].all()
            assert fits(np.bincount(drawn, minlength=K), shares * local, 3.72), (count, np.flatnonzero(local), np.unique(drawn))
"""
DIFFERENT = """
            for n in (1, local.sum() // 2, local.sum()):
                drawn = sampling_probe.draw(kv, n, 16)
                assert len(np.unique(drawn)) == n and local[drawn].all()
"""


@pytest.mark.parametrize("distribution", ['"uniform"', '"log-uniform"', "rng.random(K)**3 + 1e-6"])
def test_local_draws_on_two_nodes(run_program, distribution):
    """Of few keys (which are listed), of more, of most: every local key with its share, nothing else, and no message for it."""
    run_program(LOCAL.format(has="(3, 30, 300, 3000, 15_000)", distribution=distribution, replacement=True, body=DRAWS), nodes=2)


@pytest.mark.parametrize("distribution", ['"uniform"', "rng.random(K)**3 + 1e-6"])
def test_different_local_draws_on_two_nodes(run_program, distribution):
    run_program(LOCAL.format(has="(3, 30, 300, 3000)", distribution=distribution, replacement=False, body=DIFFERENT), nodes=2)


NOTHING = """
    import numpy as np, lapse
    K = 1000
    lapse.setup(K, 1)
    server = lapse.Server(1, dtype="int64")
    rank = server.my_rank()
    server.enable_sampling_support("local", {replacement}, {distribution}, 0, 500, seed=1)
    kv = lapse.Worker(0, server)
    if rank == 0:
        kv.set(range(K), np.arange(K))
    kv.barrier()
    if rank == 1:
        kv.localize(np.arange(500))
    kv.barrier()
    if rank == 0:
        def draw(n):
            keys, vals = np.empty(n, np.int64), np.empty(n, np.int64)
            kv.pull_sample(kv.prepare_sample(n), keys, vals)
            assert (keys == vals).all()
            assert keys.max() < 500
            return keys
        for _ in range(50):
            assert len(np.unique(draw(10))) > 1
        stats = server.stats()
        assert stats.sample_fallbacks == stats.sampled == 500
        assert stats.pulled.remote == 500
        kv.localize([600, 700])                 # outside
        draw(10)
        assert server.stats().sample_fallbacks == 510
        kv.localize([77])                       # now there is one
        assert draw(1)[0] == 77
        if {replacement}:
            assert (draw(100) == 77).all()
            assert server.stats().sample_fallbacks == 510
        else:
            keys = draw(100)
            assert keys[0] == 77 and len(np.unique(keys)) == 100
            assert server.stats().sample_fallbacks == 609
    kv.barrier()
    kv.finalize()
    server.shutdown()
    """


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("distribution", ['"uniform"', '"log-uniform"', "lambda rng, n: rng.integers(0, 500, n)"])
def test_nothing_local_falls_back(run_program, replacement, distribution):
    if not replacement and "lambda" in distribution:
        distribution = '"uniform"'
    run_program(NOTHING.format(replacement=replacement, distribution=distribution), nodes=2)


def test_local_while_keys_come_and_go(run_program):
    """Two nodes take keys from each other while both draw: values are right, and hardly anything but fallbacks goes over the network."""
    run_program("""
        import threading
        import numpy as np, lapse
        K = 400
        lapse.setup(K, 3)
        server = lapse.Server(1, dtype="int64")
        server.enable_sampling_support("local", seed=1)
        rank = server.my_rank()
        failures = []
        def work(index):
            kv = lapse.Worker(index, server)
            if rank == index == 0:
                kv.set(range(K), np.arange(K))
            kv.barrier()
            rng = np.random.default_rng(10 * rank + index)
            for i in range(1500):
                if index == 0:
                    kv.localize(rng.integers(0, K, 5))
                keys, vals = np.empty(20, np.int64), np.empty(20, np.int64)
                kv.pull_sample(kv.prepare_sample(20), keys, vals)
                if not (keys == vals).all():
                    failures.append((keys, vals))
            kv.finalize()
        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert not failures, failures[0]
        stats = server.stats()
        assert stats.sampled == 90_000
        assert stats.pulled.remote + stats.pulled.queued <= stats.sample_fallbacks + 900, stats
        server.shutdown()
        """, nodes=2)


# --- preloc and pool on more nodes

def test_prepared_samples_are_local(run_program):
    run_program("""
        import numpy as np, lapse
        K = 1000
        lapse.setup(K, 1)
        server = lapse.Server(1, dtype="int64")
        server.enable_sampling_support("preloc", seed=1)
        kv = lapse.Worker(0, server)
        if server.my_rank() == 0:
            kv.set(range(K), np.arange(K))
        kv.barrier()
        if server.my_rank() == 0:
            samples = [kv.prepare_sample(20) for _ in range(10)]
            kv.waitall()
            before = server.stats()
            keys, vals = np.empty(20, np.int64), np.empty(20, np.int64)
            for sample in samples:
                kv.pull_sample(sample, keys, vals)
                assert (keys == vals).all() and server.is_local(keys).all()
            assert server.stats().sent_messages == before.sent_messages
            assert server.stats().pulled.remote == 0
            early = kv.prepare_sample(20)               # used before its keys have arrived
            kv.pull_sample(early, keys, vals)
            assert (keys == vals).all()
        kv.barrier()
        kv.finalize()
        server.shutdown()
        """, nodes=2)


def test_what_is_not_local_is_postponed_once(run_program):
    """Node 1 holds the even keys from the pool's arrival on; they come last in each sample, and each use still comes once."""
    run_program("""
        import numpy as np, lapse
        K, GROUP, REUSE = 1000, 50, 2
        lapse.setup(K, 1)
        server = lapse.Server(1, dtype="int64")
        rank = server.my_rank()
        if rank == 0:
            drawn = []
            def function(rng, n):
                keys = rng.integers(0, K, n)
                drawn.append(keys)
                return keys
            server.enable_sampling_support("pool", True, function, group_size=GROUP, reuse=REUSE, postpone=True, seed=1, batch_size=GROUP)
        kv = lapse.Worker(0, server)
        if rank == 0:
            kv.set(range(K), np.arange(K))
            keys, vals = np.empty(GROUP * REUSE, np.int64), np.empty(GROUP * REUSE, np.int64)
            kv.pull_sample(kv.prepare_sample(GROUP * REUSE), keys, vals)
            first = server.stats().sample_postponed
        kv.barrier()
        if rank == 1:
            kv.localize(np.arange(0, K, 2))
        kv.barrier()
        if rank == 0:
            for _ in range(20):
                before = server.stats().sample_postponed
                sample = kv.prepare_sample(GROUP * REUSE)
                kv.pull_sample(sample, keys[:70], vals[:70])
                kv.pull_sample(sample, keys[70:], vals[70:])
                assert (keys == vals).all()
                assert (np.unique(keys, return_counts=True)[1] % REUSE == 0).all()
                postponed = server.stats().sample_postponed - before
                if postponed:
                    first += postponed
                    last = keys[len(keys) - postponed:]
                    assert (last % 2 == 0).all()
            assert first > 0
            assert first <= 21 * GROUP * REUSE
        kv.barrier()
        kv.finalize()
        server.shutdown()
        """, nodes=2)


def test_the_pool_ends_with_the_job(run_program):
    """A node dies: the others' draws raise NodeFailure, and no thread holds up their end."""
    done = run_program("""
        import os, threading
        import numpy as np, lapse
        lapse.setup(1000, 1)
        server = lapse.Server(1)
        server.enable_sampling_support("pool", group_size=10)
        kv = lapse.Worker(0, server)
        keys = np.empty(10, np.int64)
        kv.barrier()
        if server.my_rank() == 1:
            os._exit(7)
        try:
            while True:
                kv.pull_sample(kv.prepare_sample(10), keys)
        except lapse.NodeFailure as error:
            print("caught", error)
        try:
            server.shutdown()
        except lapse.NodeFailure:
            pass
        print("left", [t.name for t in threading.enumerate() if t.name == "lapse-sampling"])
        """, nodes=2, check=7)
    assert "caught node 1" in done.stdout and "left []" in done.stdout, done.stdout + done.stderr


def test_a_forked_child_cannot_sample(run_program):
    done = run_program("""
        import os, threading
        import numpy as np, lapse
        lapse.setup(1000, 1)
        server = lapse.Server(1)
        server.enable_sampling_support("pool")
        kv = lapse.Worker(0, server)
        sample = kv.prepare_sample(10)
        child = os.fork()
        if child == 0:
            for call in (lambda: kv.prepare_sample(1), lambda: kv.pull_sample(sample, np.empty(1, np.int64)), lambda: kv.finish_sample(sample)):
                try:
                    call()
                except RuntimeError as error:
                    assert "forked child" in str(error)
                else:
                    os._exit(1)
            del kv, server
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        kv.pull_sample(sample, np.empty(10, np.int64))
        kv.finalize()
        server.shutdown()
        """)
    assert "Traceback" not in done.stderr, done.stderr


def test_ctrl_c_ends_a_wait_for_the_pool(run_program):
    done = run_program("""
        import os, signal, threading
        import numpy as np, lapse
        lapse.setup(1000, 1)
        server = lapse.Server(1)
        held = threading.Event()
        server.enable_sampling_support("pool", True, lambda rng, n: held.wait(60) and None, batch_size=10)
        kv = lapse.Worker(0, server)
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            kv.pull_sample(kv.prepare_sample(1), np.empty(1, np.int64))
        except KeyboardInterrupt:
            print("interrupted")
        held.set()
        server.shutdown()
        """, check=None)
    assert "interrupted" in done.stdout, done.stdout + done.stderr


# --- arrays

@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("n", [0, 1, 16, 17, 5000])
def test_arrays(sampler, scheme, n):
    _, kv = sampler(scheme)
    keys = np.empty(n, np.int64)
    vals = kv.pull_sample(kv.prepare_sample(n), keys)
    assert vals.shape == (n, 2) and (vals == keys[:, None]).all()
    flat = np.empty(2 * n)
    assert kv.pull_sample(kv.prepare_sample(n), keys, flat) == -1
    assert (flat.reshape(n, 2) == keys[:, None]).all()
    later = kv.pull_sample(kv.prepare_sample(n), keys, None, True)
    assert (later.result() == keys[:, None]).all()


@pytest.mark.parametrize("how", [(True,), {"asynchronous": True}, {"async": True}])
def test_asynchronous(sampler, how):
    _, kv = sampler("naive", shared_memory=False)
    positional, named = (how, {}) if isinstance(how, tuple) else ((), how)
    rooms = [(np.empty(5, np.int64), np.empty((5, 2))) for _ in range(50)]
    stamps = [kv.pull_sample(kv.prepare_sample(5), keys, vals, *positional, **named) for keys, vals in rooms]
    assert max(stamps) > 0
    assert len(kv.buffers) > 0          # held until they have finished
    for stamp, (keys, vals) in zip(stamps, rooms, strict=True):
        kv.wait(stamp)
        assert (vals == keys[:, None]).all()
    with pytest.raises(ValueError, match="timeout is for synchronous calls"):
        kv.pull_sample(kv.prepare_sample(5), *rooms[0], True, timeout=1)


def test_tensors(sampler):
    torch = pytest.importorskip("torch")
    _, kv = sampler()
    keys, vals = torch.empty(5, dtype=torch.int64), torch.empty(5, 2, dtype=torch.float64)
    assert kv.pull_sample(kv.prepare_sample(5), keys, vals) == -1
    assert (vals == keys[:, None]).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_values_of_different_lengths(sampler, scheme):
    lengths = np.arange(K) % 4
    _, kv = sampler(scheme, length=lengths)
    values = np.repeat(np.arange(K, dtype=float), lengths)
    kv.set(range(K), values)
    keys = np.empty(100, np.int64)
    vals = kv.pull_sample(kv.prepare_sample(100), keys)
    assert vals.tolist() == np.repeat(keys.astype(float), lengths[keys]).tolist()
    room = np.full(300, -1.0)
    kv.pull_sample(kv.prepare_sample(100), keys, room)
    expected = np.repeat(keys.astype(float), lengths[keys])
    assert room[:len(expected)].tolist() == expected.tolist() and (room[len(expected):] == -1).all()
    with pytest.raises(ValueError, match="100 draws may have up to 300 values, but vals has 299 values"):
        kv.pull_sample(kv.prepare_sample(100), keys, room[:299])


def wrong_keys():
    frozen = np.empty(4, np.int64)
    frozen.flags.writeable = False
    return [([1, 2, 3, 4], TypeError, "NumPy array or a torch CPU tensor, not list"), (np.empty(4, np.int32), TypeError, "dtype int64"),
            (np.empty(4), TypeError, "dtype int64"), (np.empty((2, 2), np.int64), ValueError, "one dimension"),
            (np.empty(8, np.int64)[::2], ValueError, "contiguous"), (frozen, ValueError, "keys must be writeable"), (None, TypeError, "NoneType")]


@pytest.mark.parametrize(("keys", "error", "text"), wrong_keys())
def test_wrong_keys(sampler, keys, error, text):
    server, kv = sampler()
    with pytest.raises(error, match=text):
        kv.pull_sample(kv.prepare_sample(4), keys, np.empty((4, 2)))
    assert server.stats().sampled == 0


@pytest.mark.parametrize(("vals", "error", "text"), [
    (np.empty((3, 2)), ValueError, "4 draws have 8 values, but vals has values of shape"), (np.empty(9), ValueError, "4 draws have 8 values"),
    (np.empty((2, 4)), ValueError, "4 draws have 8 values"), (np.empty((4, 2), np.float32), TypeError, "dtype float64"),
    ([1.0] * 8, TypeError, "not list"), (np.empty((4, 4))[:, ::2], ValueError, "contiguous"),
])
def test_wrong_vals(sampler, vals, error, text):
    server, kv = sampler()
    sample = kv.prepare_sample(4)
    with pytest.raises(error, match=text):
        kv.pull_sample(sample, np.empty(4, np.int64), vals)
    assert server.stats().sampled == 0
    kv.pull_sample(sample, np.empty(4, np.int64))


# --- enabling

@pytest.mark.parametrize(("settings", "error", "text"), [
    ({"scheme": "greedy"}, ValueError, r"unknown sampling scheme 'greedy': it is one of naive, preloc, pool, local \(= onlylocal\)"),
    ({"scheme": None}, ValueError, "unknown sampling scheme None"),
    ({"distribution": "zipf"}, ValueError, "unknown distribution 'zipf': it is one of uniform, log-uniform"),
    ({"distribution": None}, TypeError, "a name, an array of weights or a callable"),
    ({"distribution": ["a"] * K}, TypeError, "an array of weights"),
    ({"distribution": np.ones(K - 1)}, ValueError, rf"must have {K} weights.*not shape \({K - 1},\)"),
    ({"distribution": np.ones((K, 1))}, ValueError, "weights"), ({"distribution": 3.0}, ValueError, "weights"),
    ({"distribution": np.zeros(K)}, ValueError, "not all 0"), ({"distribution": -np.ones(K)}, ValueError, "at least 0"),
    ({"distribution": np.full(K, np.nan)}, ValueError, "finite"), ({"distribution": np.full(K, np.inf)}, ValueError, "finite"),
    ({"distribution": np.full(K, 1e308)}, ValueError, "finite"),
    ({"min": -1}, lapse.KeyRangeError, rf"min is -1: it must be a key, in \[0, {K}\)"), ({"min": K}, lapse.KeyRangeError, "min is"),
    ({"max": K + 1}, lapse.KeyRangeError, f"max is {K + 1}: samples are drawn below it, and there are {K} keys"),
    ({"min": 7, "max": 7}, ValueError, r"nothing to draw in \[7, 7\)"), ({"min": 7, "max": 3}, ValueError, "nothing to draw"),
    ({"max": -2}, ValueError, "nothing to draw"),
    ({"min": 1.5}, TypeError, "min must be a whole number"), ({"max": "9"}, TypeError, "max must be a whole number"),
    ({"seed": -1}, ValueError, "seed"), ({"seed": 2**64}, ValueError, "seed"), ({"seed": 1.5}, TypeError, "seed"),
    ({"group_size": 0}, ValueError, "group_size"), ({"group_size": 2**40}, ValueError, "group_size"),
    ({"reuse": 0}, ValueError, "reuse"), ({"reuse": 2**40}, ValueError, "reuse"), ({"batch_size": 0}, ValueError, "batch_size"),
    ({"with_replacement": "no"}, TypeError, "with_replacement must be True or False"), ({"postpone": 2}, TypeError, "postpone"),
    ({"speed": 1}, TypeError, "speed"),
])
def test_wrong_settings(serve, settings, error, text):
    server = serve(2, num_keys=K)
    with pytest.raises(error, match=text):
        server.enable_sampling_support(**settings)
    server.enable_sampling_support()            # nothing has happened


def test_enabled_twice_or_too_late(serve):
    server = serve(2, num_keys=K)
    server.enable_sampling_support()
    with pytest.raises(RuntimeError, match="enabled before"):
        server.enable_sampling_support()
    server.shutdown()
    with pytest.raises(RuntimeError, match="shut down"):
        server.enable_sampling_support()
    server = serve(2, num_keys=K)
    kv = lapse.Worker(0, server)
    with pytest.raises(RuntimeError, match="before the first Worker"):
        server.enable_sampling_support()
    kv.finalize()
    with pytest.raises(RuntimeError, match="before the first Worker"):
        server.enable_sampling_support()


def test_not_enabled(serve):
    with lapse.Worker(0, serve(2, num_keys=K)) as kv:
        for call in (lambda: kv.prepare_sample(1), lambda: kv.pull_sample(0, np.empty(1, np.int64)), lambda: kv.finish_sample(0)):
            with pytest.raises(RuntimeError, match=r"call Server\.enable_sampling_support before the first Worker"):
                call()
        assert sampling_probe.prepare(kv, 1) == ERR_NO_SAMPLING
        assert sampling_probe.codes(kv, 0, 1) == (ERR_NO_SAMPLING,) * 3


@pytest.mark.parametrize("scheme", SCHEMES)
def test_calls_after_the_end(serve, scheme):
    server = serve(2, num_keys=K)
    server.enable_sampling_support(scheme)
    kv = lapse.Worker(0, server)
    sample = kv.prepare_sample(1)
    calls = (lambda: kv.prepare_sample(1), lambda: kv.pull_sample(sample, np.empty(1, np.int64)), lambda: kv.finish_sample(sample))
    kv.finalize()
    for call in calls:
        with pytest.raises(RuntimeError, match="finalized"):
            call()
    kv = lapse.Worker(0, server)
    sample = kv.prepare_sample(1)
    server.shutdown()
    for call in calls:
        with pytest.raises(RuntimeError, match="shut down"):
            call()


def test_another_name_for_local(serve):
    server = serve(2, num_keys=K)
    server.enable_sampling_support("onlylocal", True, "log-uniform", 0, K)


@pytest.mark.parametrize("words", [[], ["--sampling.scheme", "pool", "--sampling.reuse", "3", "--sampling.postpone", "1"],
                                   ["--sampling.strategy=onlylocal", "--sampling.with_replacement", "0", "--sampling.batch_size", "7"]])
def test_options_of_a_program(serve, words):
    settings = sampling_settings(program_parser("p", "").parse_args(words))
    server = serve(2, num_keys=K)
    server.enable_sampling_support(**settings)
    with lapse.Worker(0, server) as kv:
        keys = np.empty(10, np.int64)
        assert kv.pull_sample(kv.prepare_sample(10), keys).shape == (10, 2)


def test_statistics_start_anew(sampler):
    server, kv = sampler("pool")
    pulled(kv, 1000)
    assert server.stats().sampled == 1000 and server.stats().pool_refills > 0
    assert "sampled" in server.job_stats().table()
    kv.end_setup()
    assert server.stats().sampled == 0
