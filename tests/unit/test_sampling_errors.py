"""Sampling: arrays, settings, statistics, and every row of the error table that concerns them."""
import numpy as np
import pytest

import lapse
from lapse.options import program_parser, sampling_settings
from tests.unit import sampling_probe
from tests.unit.sampling_common import ERR_NO_SAMPLING, SCHEMES, K, pulled

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
            (np.empty(8, np.int64)[::2], ValueError, "contiguous"), (frozen, ValueError, "keys must be writeable"),
            (None, TypeError, "NoneType")]


@pytest.mark.parametrize(("keys", "error", "text"), wrong_keys())
def test_wrong_keys(sampler, keys, error, text):
    server, kv = sampler()
    with pytest.raises(error, match=text):
        kv.pull_sample(kv.prepare_sample(4), keys, np.empty((4, 2)))
    assert server.stats().sampled == 0


@pytest.mark.parametrize(("vals", "error", "text"), [
    (np.empty((3, 2)), ValueError, "4 draws have 8 values, but vals has values of shape"),
    (np.empty(9), ValueError, "4 draws have 8 values"),
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


@pytest.mark.parametrize("what", ["lapse.node.Filler", "threading.Thread.start"])
def test_a_pool_without_its_thread_is_not_enabled(serve, monkeypatch, what):
    server = serve(2, num_keys=K)

    def fail(*arguments):
        raise MemoryError("none left")
    with monkeypatch.context() as broken:
        broken.setattr(what, fail)
        with pytest.raises(MemoryError):
            server.enable_sampling_support("pool")
    server.enable_sampling_support("pool", seed=1)  # another try may do better
    with lapse.Worker(0, server) as kv:
        assert kv.pull_sample(kv.prepare_sample(10), np.empty(10, np.int64)).shape == (10, 2)


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
