"""The store against a dict, byte by byte; under threads; and what it costs in memory."""
import itertools
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from lapse._build import kind
from tests.ext.probe_build import load_extension

EXT = Path(__file__).resolve().parents[1] / "ext"

DTYPES = [np.float32, np.float64, np.int32, np.int64]       # in the order of ValueType
PATIENCE = 100      # seconds


@pytest.fixture(scope="module")
def probe():
    return load_extension(EXT / "store_probe.pyx")


class Model:
    """What a store should do, said in the plainest way."""

    def __init__(self, num_keys, home, dtype, visible, stored):
        self.home, self.dtype, self.visible, self.stored = home, dtype, visible, stored
        self.here = {k: np.zeros(stored[k], dtype) for k in range(*home)}
        self.epochs = dict.fromkeys(range(num_keys), 0)

    def runs(self, keys):
        ends = np.cumsum([self.visible[k] for k in keys]) if len(keys) else np.zeros(0, int)
        return [slice(e - self.visible[k], e) for e, k in zip(ends, keys)]

    def batch(self, what, keys, vals):
        missed = []
        for i, (k, run) in enumerate(zip(keys, self.runs(keys))):
            if k not in self.here or (what == "set" and missed):
                missed.append(i)
            elif what == "pull":
                vals[run] = self.here[k][:self.visible[k]]
            elif what == "push":
                self.here[k][:self.visible[k]] += vals[run]
            elif what == "set":
                self.here[k][:self.visible[k]] = vals[run]
        return missed


def make(probe, num_keys, home, dtype, lengths, rng):
    """A store and its model: `lengths` is (visible, stored) or "mixed"."""
    if lengths == "mixed":
        visible = rng.integers(0, 40, num_keys).astype(np.uint32)
        visible[rng.random(num_keys) < 0.05] = 700
        stored = visible + rng.integers(0, 2, num_keys).astype(np.uint32) * 3
        store = probe.Probe(num_keys, *home, DTYPES.index(dtype), visible, stored)
    else:
        store = probe.Probe(num_keys, *home, DTYPES.index(dtype), *lengths)
        visible, stored = (np.full(num_keys, n) for n in lengths)
    return store, Model(num_keys, home, dtype, visible.tolist(), stored.tolist())


def numbers(rng, n, dtype):
    return rng.integers(-1000, 1000, n).astype(dtype)       # small whole numbers: sums are exact in every type


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [
    (0, 0), (0, 2), (1, 1), (2, 2), (3, 5), (4, 4), (7, 7), (10, 10), (16, 17), (33, 33), (100, 100), (1000, 2000), "mixed"], ids=str)
def test_random_operations_as_a_dict_would_do_them(probe, dtype, lengths):
    rng = np.random.default_rng(DTYPES.index(dtype) + 10)
    num_keys, home = 97, (20, 70)
    store, model = make(probe, num_keys, home, dtype, lengths, rng)
    missed_some = 0
    for _step in range(400):
        what = ("pull", "push", "set", "absent", "in", "out")[rng.integers(6)]
        if what in ("in", "out"):
            k = int(rng.integers(num_keys))
            epoch = model.epochs[k] + 1
            if what == "out" and k in model.here:
                assert store.remove(k, epoch) == model.here.pop(k).tobytes()
                model.epochs[k] = epoch
            elif what == "in" and k not in model.here:
                values = numbers(rng, model.stored[k], dtype) if rng.random() < 0.7 else None
                store.insert(k, epoch, None if values is None else values.tobytes())
                model.here[k] = np.zeros(model.stored[k], dtype) if values is None else values
                model.epochs[k] = epoch
            continue
        n = int(rng.choice([0, 1, 2, 5, 30, 300]))
        keys = rng.integers(0, num_keys, n)
        if what == "set" and rng.random() < 0.5:            # often without a miss, or with a late one
            keys = rng.choice(sorted(model.here), n)
            if n > 2 and rng.random() < 0.3:
                keys[n // 2] = rng.integers(num_keys)
        vals = numbers(rng, sum(model.visible[k] for k in keys), dtype)
        expected = vals.copy()
        missed = model.batch(what, keys, expected)
        assert store.batch(what, keys, vals.view(np.uint8)) == missed
        missed_some += bool(missed)
        assert (vals == expected).all()                     # pull: values, and untouched where missed; others: unchanged
        assert store.bytes_of(keys) == vals.nbytes
    assert missed_some > 20
    for k in range(num_keys):
        assert store.state(k) == ("here" if k in model.here else "away")
        assert store.epoch(k) == model.epochs[k]
        if k in model.here:                                 # all that is stored, not only what is visible
            assert store.remove(k, 7) == model.here[k].tobytes()


def test_values_need_not_be_aligned(probe):
    store = probe.Probe(4, 0, 4, 1, 5, 5)
    vals = np.arange(10, dtype=np.float64)
    shifted = np.zeros(81, np.uint8)
    shifted[1:] = vals.view(np.uint8)
    keys = np.array([1, 2])
    for what in ("push", "set", "push"):
        assert store.batch(what, keys, shifted[1:]) == []
    assert store.batch("pull", keys, shifted[1:]) == []
    assert shifted[1:].tobytes() == (2 * vals).tobytes()


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_integers_wrap(probe, dtype):
    store = probe.Probe(1, 0, 1, DTYPES.index(dtype), 3, 3)
    most = np.iinfo(dtype).max
    for value in (most, 1):
        store.batch("push", np.array([0]), np.full(3, value, dtype).view(np.uint8))
    out = np.zeros(3, dtype)
    store.batch("pull", np.array([0]), out.view(np.uint8))
    assert (out == np.iinfo(dtype).min).all()


def test_a_key_s_life(probe):
    store = probe.Probe(10, 0, 5, 0, 2, 3)
    assert store.sizes(3) == (8, 12)
    assert [store.state(k) for k in (4, 5)] == ["here", "away"]
    assert store.epoch(4) == 0
    assert store.remove(4, 1) == bytes(12)                  # untouched
    assert (store.state(4), store.epoch(4)) == ("away", 1)
    assert store.expect(4, 0x12345678) == 0x12345678
    assert store.state(4) == "coming"
    assert store.batch("absent", np.array([4, 3, 5]), np.zeros(0, np.uint8)) == [0, 2]
    assert store.batch("pull", np.array([4]), np.ones(8, np.uint8)) == [0]
    values = np.array([1, 2, 3], np.float32)
    store.insert(4, 2, values.tobytes())
    assert (store.state(4), store.epoch(4)) == ("here", 2)
    store.add(4, np.array([10, 10], np.float32).tobytes())  # the visible ones only
    assert store.remove(4, 3) == np.array([11, 12, 3], np.float32).tobytes()
    store.pass_on(4, 0xFFFFFFFF)                            # the largest epoch is no other state
    assert (store.state(4), store.epoch(4)) == ("away", 0xFFFFFFFF)
    store.pass_on(5, 0)
    assert (store.state(5), store.epoch(5)) == ("away", 0)
    store.pass_on(3, 0)                                     # of a home key: gone, though epoch 0
    assert store.state(3) == "away"


def test_rows_stay_where_they_are_and_free_ones_are_used_again(probe):
    store = probe.Probe(5000, 0, 5000, 0, 10, 10)
    addresses = [store.address(k) for k in range(5000)]
    assert len(set(addresses)) == 5000
    assert all(a % 8 == 0 for a in addresses)
    spans = sorted(addresses)
    assert all(b - a >= 40 + 8 for a, b in itertools.pairwise(spans))       # rows and headers do not overlap
    assert [store.address(k) for k in range(5000)] == addresses
    for k in range(0, 5000, 3):
        store.remove(k, 1)
    for k in reversed(range(0, 5000, 3)):
        store.insert(k, 2, None)
    assert {store.address(k) for k in range(5000)} == set(addresses)
    assert all(store.address(k) == addresses[k] for k in range(5000) if k % 3)


def test_a_used_row_comes_back_as_zeros(probe):
    store = probe.Probe(2, 0, 2, 0, 4, 4)
    store.batch("push", np.array([0]), np.ones(4, np.float32).view(np.uint8))
    at = store.address(0)
    store.remove(0, 1)
    assert store.address(1) == at
    out = np.ones(4, np.float32)
    assert store.batch("pull", np.array([1]), out.view(np.uint8)) == []
    assert (out == 0).all()
    assert store.epoch(1) == 0


def test_long_and_odd_rows(probe):
    """Rows longer than a region, and one class per key."""
    lengths = np.arange(300, dtype=np.uint32) * 37
    lengths[5] = 5_000_000
    store = probe.Probe(300, 0, 300, 0, lengths, lengths)
    for k in range(300):
        store.batch("push", np.array([k]), np.full(lengths[k], k + 1, np.float32).view(np.uint8))
    keys = np.arange(300)
    out = np.zeros(lengths.sum(), np.float32)
    assert store.batch("pull", keys, out.view(np.uint8)) == []
    assert (out == np.repeat(keys + 1, lengths)).all()


@pytest.mark.parametrize("n", [1, 2, 3, 8, 9, 64, 1000])
def test_the_first_key_out_of_range_is_found(probe, n):
    keys = np.random.default_rng(n).integers(0, 50, n)
    assert probe.out_of_range(keys, 50) == -1
    for bad in (-1, 50, 2**63 - 1, -2**63, -2**62, 2**32):
        for at in {0, n // 2, n - 1}:
            broken = keys.copy()
            broken[at] = bad
            assert probe.out_of_range(broken, 50) == at
            broken[n - 1] = bad
            assert probe.out_of_range(broken, 50) == at
    assert probe.out_of_range(np.array([49]), 50) == -1
    assert probe.out_of_range(np.array([0]), 1) == -1
    assert probe.out_of_range(np.zeros(0, np.int64), 1) == -1
    assert probe.out_of_range(np.array([2**63 - 2]), 2**63 - 1) == -1


def test_digests_tell_which_keys_are_here_and_since_when(probe):
    store, other = (probe.Probe(100, 0, 25, 0, 1, 1) for _ in range(2))
    assert store.digest(25, 4) == [(0, 0)] * 4              # epoch 0 is not counted
    for k, epoch in ((3, 2), (30, 1), (31, 5), (99, 1)):
        store.remove(k, 1)
        store.insert(k, epoch, None)
    counts, digests = zip(*store.digest(25, 4))
    assert counts == (1, 2, 0, 1)
    assert digests[1] == probe.mix(30, 1) ^ probe.mix(31, 5)
    for k, epoch in ((31, 5), (30, 2)):
        other.insert(k, epoch, None)
    assert other.digest(25, 4)[1][0] == 2 and other.digest(25, 4)[1] != store.digest(25, 4)[1]
    other.remove(30, 3)
    other.insert(30, 1, None)
    assert other.digest(25, 4)[1] == store.digest(25, 4)[1]
    mixed = {probe.mix(k, e) for k in range(200) for e in range(200)}
    assert len(mixed) == 200 * 200


def in_threads(*calls):
    """Run them at once; their results in order. An exception in one is raised here."""
    results, errors = [None] * len(calls), []

    def run(i, call):
        try:
            results[i] = call()
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=run, args=(i, c), daemon=True) for i, c in enumerate(calls)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(PATIENCE)
        assert not t.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]
    return results


@pytest.mark.parametrize("lengths", [1, 10, 100])
def test_every_push_of_every_thread_counts_once(probe, lengths):
    rng = np.random.default_rng(3)
    store = probe.Probe(20, 0, 20, 3, lengths, lengths)     # few keys: untouched ones are touched by all threads at once
    keys = [rng.integers(0, 20, 500) for _ in range(4)]
    ones = np.ones(500 * lengths, np.int64)

    def puller():
        return store.pull_until_stopped(np.arange(20), lengths)

    def pusher(i):
        return store.push_often(keys[i], ones.view(np.uint8), 300, 300, 0)

    def pushers():
        try:
            return in_threads(*(lambda i=i: pusher(i) for i in range(4)))
        finally:
            store.halt()

    served, torn = in_threads(pushers, puller)
    assert torn == 0
    assert all(found == 500 * rounds for rounds, found in served)
    out = np.zeros((20, lengths), np.int64)
    assert store.batch("pull", np.arange(20), out.ravel().view(np.uint8)) == []
    expected = sum(rounds * np.bincount(k, minlength=20) for k, (rounds, _) in zip(keys, served))
    assert (out == expected[:, None]).all()


def test_relocations_under_the_hands_of_pushing_and_pulling_threads(probe):
    lengths = 9
    store = probe.Probe(40, 0, 40, 3, lengths, lengths)
    rng = np.random.default_rng(4)
    keys = [rng.integers(0, 40, 200) for _ in range(2)]
    ones = np.ones(200 * lengths, np.int64)

    def pushers():
        try:
            return in_threads(*(lambda i=i: store.push_often(keys[i], ones.view(np.uint8), 500, 500, 20000) for i in range(2)))
        finally:
            store.halt()

    served, moves, torn = in_threads(
        pushers, lambda: store.relocate_until_stopped(np.arange(40)), lambda: store.pull_until_stopped(np.arange(40), lengths))
    assert torn == 0
    out = np.zeros((40, lengths), np.int64)
    assert store.batch("pull", np.arange(40), out.ravel().view(np.uint8)) == []
    assert (out == out[:, :1]).all()
    assert out[:, 0].sum() == sum(found for _, found in served)
    assert sum(store.epoch(k) for k in range(40)) == moves


@pytest.mark.parametrize("classes", [1, 500])
def test_rows_made_by_many_threads_at_once_are_all_different(probe, classes):
    num_keys = 40_000
    lengths = (1 + np.arange(num_keys) % classes).astype(np.uint32)
    moving = np.arange(50)                      # these leave and come back meanwhile: their rows change hands
    ones = np.ones(lengths.sum(), np.int32).view(np.uint8)

    def pushers(store, orders):
        try:
            return in_threads(*(lambda keys=keys: store.push_often(keys, ones, 1, 0, 200) for keys in orders))
        finally:
            store.halt()

    for attempt in range(5):
        store = probe.Probe(num_keys, 0, num_keys, 2, lengths, lengths)
        rng = np.random.default_rng(attempt)
        orders = [50 + rng.permutation(num_keys - 50) for _ in range(3)]
        served, _ = in_threads(partial(pushers, store, orders), partial(store.relocate_until_stopped, moving))
        rows = np.array([store.address(k) for k in range(num_keys)])
        order = np.argsort(rows)
        assert (np.diff(rows[order]) >= 4 * lengths[order][:-1] + 8).all()
        out = np.zeros(lengths.sum(), np.int32)
        assert store.batch("pull", np.arange(num_keys), out.view(np.uint8)) == []
        assert (out == np.repeat(np.arange(num_keys) >= 50, lengths) * sum(rounds for rounds, _ in served)).all()


def test_sets_are_never_torn(probe):
    store = probe.Probe(8, 0, 8, 3, 50, 50)
    keys = np.arange(8)
    values = [np.full(8 * 50, i, np.int64) for i in range(2)]

    def setters():
        try:
            in_threads(*(lambda v=v: store.set_often(keys, v.view(np.uint8), 2000) for v in values))
        finally:
            store.halt()

    _, torn = in_threads(setters, lambda: store.pull_until_stopped(keys, 50))
    assert torn == 0


@pytest.mark.parametrize("what", ["pull", "push", "set"])
def test_a_latched_key_is_waited_for_and_nothing_else_is_held(probe, what):
    """While one key of a batch is latched the batch waits, holding no latch itself."""
    store = probe.Probe(6, 0, 6, 3, 1, 1)
    store.touch(0, 6)
    word = store.take_latch(3)
    done = threading.Event()
    vals = np.ones(6, np.int64)

    def run():
        store.batch(what, np.arange(6), vals.view(np.uint8))
        done.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    if what != "pull":                                      # the keys before it are served ...
        out = np.zeros(1, np.int64)
        until = time.monotonic() + 30
        while not out[0]:
            assert time.monotonic() < until
            assert store.batch("pull", np.array([2]), out.view(np.uint8)) == []
    out = np.zeros(5, np.int64)
    assert store.batch("pull", np.array([0, 1, 2, 4, 5]), out.view(np.uint8)) == []     # ... and free
    assert out[3:].tolist() == [0, 0]                       # those behind it are still to be served
    assert not done.is_set()
    store.give_latch(3, word)
    assert done.wait(30)
    thread.join(30)
    assert vals.tolist() == [0 if what == "pull" else 1] * 6


MEMORY = """
import sys
import numpy as np
sys.path.insert(0, {ext!r})
from probe_build import load_extension
probe = load_extension({ext!r} + "/store_probe.pyx")

def resident():
    for line in open("/proc/self/smaps_rollup"):
        if line.startswith("Rss:"):
            return int(line.split()[1]) * 1024

def cost(num_keys, length, touched, mixed):
    before = resident()
    lengths = np.full(num_keys, length, np.uint32) if mixed else length
    if mixed:
        lengths[::2] -= 1
        before = resident()
    store = probe.Probe(num_keys, 0, num_keys, 0, lengths, lengths)
    if touched:
        store.touch(0, num_keys)
    else:                       # every slot is read, and latched
        out = np.zeros(1 << 16, np.uint8)
        for k in range(0, num_keys, 1000):
            store.batch("pull", np.arange(k, k + 1000), out)
    return resident() - before

small, large = {sizes}
values = 0
if {touched}:
    values = (4 * {length} if not {mixed} else 4 * {length} - 2)
slope = (cost(large, {length}, {touched}, {mixed}) - cost(small, {length}, {touched}, {mixed})) / (large - small)
print(slope - values)
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists() or kind in ("asan", "tsan"),
                    reason="reads Linux's resident size, to which sanitizers add")
@pytest.mark.parametrize("length, touched, mixed, most", [
    (10, False, False, 10), (10, True, False, 24), (1, True, False, 24), (2, True, False, 24), (10, True, True, 32),
    (10, False, True, 18)], ids=str)
def test_bytes_per_key(length, touched, mixed, most):
    """The slope of resident memory from 2 to 8 million keys, beyond the values."""
    code = MEMORY.format(ext=str(EXT), sizes=(2_000_000, 8_000_000), length=length, touched=touched, mixed=mixed)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=True)
    slope = float(done.stdout)
    print(f"length {length}, touched {touched}, mixed {mixed}: {slope:.2f} bytes per key beyond its values")
    assert 0 < slope <= most


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists() or kind in ("asan", "tsan"),
                    reason="reads Linux's resident size, to which sanitizers add")
def test_a_small_store_is_small(probe):
    def resident():
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("Rss:"))

    stores = [probe.Probe(100, 0, 100, 0, 10, 10) for _ in range(3)]
    before = resident()
    for _ in range(200):
        stores.append(probe.Probe(100, 0, 100, 0, 10, 10))
        stores[-1].touch(0, 100)
    assert (resident() - before) / 200 <= 24    # KiB for 4 KiB of values: slots, rows and bookkeeping
