"""Sampling on one node: distributions, seeds, handles, replacement, callables, the schemes."""
import gc
import threading
import time
import weakref

import numpy as np
import pytest

import lapse
from lapse._build import kind
from tests.cluster.common import fits, shares_of
from tests.unit import sampling_probe
from tests.unit.sampling_common import ERR_DRAW, ERR_SAMPLE, ERR_SAMPLE_COUNT, SCHEMES, K, Z, counted, pulled

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
                 "weights": (WEIGHTS, WEIGHTS), "list": ([0] * 48 + [3, 1], np.array([0] * 48 + [3, 1])),
                 "function": (by_function, WEIGHTS)}


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


@pytest.mark.skipif(kind in ("asan", "tsan"), reason="a sanitizer keeps memory that was freed")
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


@pytest.mark.parametrize("scheme", SCHEMES)
def test_handles_of_another_worker(serve, scheme):
    """Each has its own numbers, also one that takes the place of another."""
    server = serve(2, num_keys=K, threads=2)
    server.enable_sampling_support(scheme)
    keys = np.empty(1, np.int64)
    first, second = lapse.Worker(0, server), lapse.Worker(1, server)
    samples = [[kv.prepare_sample(5) for _ in range(3)] for kv in (first, second)]
    third, first = first, None
    del third                                       # its slot is free
    third = lapse.Worker(0, server)
    samples.append([third.prepare_sample(5) for _ in range(3)])
    assert len({sample for some in samples for sample in some}) == 9
    for kv, own in ((second, samples[1]), (third, samples[2])):
        for others in samples:
            for sample in others if others is not own else ():
                with pytest.raises(ValueError, match=f"sample {sample}: this Worker never prepared it"):
                    kv.pull_sample(sample, keys)
                with pytest.raises(ValueError, match=f"sample {sample}: this Worker never prepared it"):
                    kv.finish_sample(sample)
                assert sampling_probe.codes(kv, sample, 1) == (ERR_SAMPLE,) * 3
        for sample in own:
            kv.pull_sample(sample, keys)
            kv.finish_sample(sample)
            kv.finish_sample(sample)                # again: nothing


@pytest.mark.parametrize("n", [-1, 2**32, 2**70])
def test_wrong_numbers_of_draws(sampler, n):
    _, kv = sampler()
    with pytest.raises(ValueError, match=r"must be in \[0, 2\*\*32\)"):
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
    """Of four keys: every ordered outcome has the probability of drawing them one after the other. (With n = 4, out of order_rest.)"""
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


@pytest.mark.parametrize(("distribution", "many"), [("uniform", 4_000_000), ("log-uniform", 200_000)])
def test_a_local_sample_of_all_keys_of_many(serve, distribution, many):
    """Done at once, or not before the deadline if each of the last ones looks at all keys."""
    server = serve(0, num_keys=many)
    server.enable_sampling_support("local", False, distribution, seed=1)
    with lapse.Worker(0, server) as kv:
        keys = sampling_probe.draw(kv, many, 1000)
        assert (np.bincount(keys, minlength=many) == 1).all()
        assert server.stats().sample_fallbacks == 0


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
    assert sampling_probe.draw(kv, 5, 5) == ERR_DRAW
    assert isinstance(kv.draw_error, error)
    with pytest.raises(lapse.KeyRangeError, match=str(K + 7)):      # a later call fails for a reason of its own
        kv.pull([K + 7])
    assert sampling_probe.prepare(kv, -1) == ERR_SAMPLE_COUNT
    kv.waitall()


@pytest.mark.parametrize("scheme", ["naive", "local"])
def test_what_a_failed_call_drew_comes_again(sampler, scheme):
    calls = []

    def function(rng, n):
        calls.append(n)
        if len(calls) == 2:
            raise LookupError("not now")
        return np.arange(n) + n * (len(calls) % 2)

    _, kv = sampler(scheme, False, function, 0, 40, batch_size=20)
    sample = kv.prepare_sample(40)
    keys = np.empty(40, np.int64)
    with pytest.raises(LookupError):
        kv.pull_sample(sample, keys)
    kv.pull_sample(sample, keys)
    assert sorted(keys) == list(range(40))


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
        assert (group[100:] == group[:-100]).mean() < 0.1       # in random order, not once all and then again
    assert (np.sort(groups, axis=1)[:-1] != np.sort(groups, axis=1)[1:]).any()
    assert 50 <= server.stats().pool_refills < 50 + 64 + 64


@pytest.mark.parametrize("postpone", [False, True])
def test_eight_threads_get_each_use_once(serve, postpone):
    """Each draw of 6,000 groups comes exactly `reuse` times to one of eight threads, over many handles of any size."""
    threads, group, reuse, groups = 8, 50, 3, 6000
    server = serve(1, num_keys=20_000_000, threads=threads)
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
            if rng.random() < 0.01:      # takes from the pool, and gives back
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


def test_threads_share_the_list_of_local_keys(serve):
    """Four threads make it anew all the time, each letting go of what may be another one's; in the end one reference is left."""
    threads = 4
    server = serve(1, threads=threads)
    server.enable_sampling_support("local", seed=1)
    workers = [lapse.Worker(index, server) for index in range(threads)]
    run_all(lambda index: sampling_probe.make_lists(workers[index], 200_000), threads)
    assert sampling_probe.references(workers[0]) == 1


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


def test_the_limit_is_for_the_call(sampler):
    """Uses come one by one, each of them well within the limit, and all of them far beyond it."""
    pause = threading.Event()

    def slow(rng, n):
        pause.wait(0.05)
        return rng.integers(0, K, n)

    server, kv = sampler("pool", True, slow, group_size=1, batch_size=1)
    sample = kv.prepare_sample(100)
    keys = np.empty(100, np.int64)
    with pytest.raises(TimeoutError, match="nothing was drawn"):
        kv.pull_sample(sample, keys, timeout=0.3)
    assert server.stats().sampled == 0
    pause.set()
    kv.pull_sample(sample, keys)


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
    while not server.stats().pool_waits and thread.is_alive() and not never.is_set():
        time.sleep(0)
    threading.Timer(0.2, never.set).start()
    server.shutdown()
    thread.join(30)
    assert not thread.is_alive()
    assert not ended or "shut down" in ended[0]
    assert not [t for t in threading.enumerate() if t.name == "lapse-sampling"]


def test_the_pool_ends_with_a_dropped_server(serve):
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
