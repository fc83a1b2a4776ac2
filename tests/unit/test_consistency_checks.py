"""The checks of tests/cluster/test_consistency see what they are there for."""
import importlib
from pathlib import Path

import numpy as np
import pytest

PROGRAMS = Path(__file__).parents[1] / "cluster"


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.syspath_prepend(str(PROGRAMS))
    return importlib.import_module("_consistency")


@pytest.fixture
def program(monkeypatch):
    monkeypatch.syspath_prepend(str(PROGRAMS))
    return importlib.import_module("test_consistency")


def observe(observer, keys, own, values):
    observer.observe(*(np.array(part, dtype=np.int64) for part in (keys, own, values)))


def test_right_reads(kernel):
    observer = kernel.Observer(1, 3, 2, 100)
    observe(observer, [0, 0, 1], [0, 0, 0], [[0, 0, 0], [2, 0, 1], [0, 0, 5]])
    observe(observer, [0, 1], [4, 0], [[2, 4, 1], [0, 0, 5]])
    observe(observer, [], [], np.empty((0, 3), dtype=np.int64))
    assert (observer.reads, observer.missing, observer.back, observer.first_key) == (5, 0, 0, -1)
    keys, rows = observer.views()
    assert keys.tolist() == [0, 1, 0]       # zeros are not kept, nor what was read before
    assert rows.tolist() == [[2, 0, 1], [0, 0, 5], [2, 4, 1]]


@pytest.mark.parametrize("number", [3, 5])
def test_an_own_number_that_is_not_exact(kernel, number):
    observer = kernel.Observer(0, 2, 2, 100)
    observe(observer, [1], [4], [[number, 0]])
    assert (observer.missing, observer.back, observer.first_key) == (1, 0, 1)


def test_a_read_that_goes_back(kernel):
    observer = kernel.Observer(0, 3, 2, 100)
    observe(observer, [0], [1], [[1, 5, 5]])
    observe(observer, [0], [1], [[1, 6, 4]])
    assert (observer.missing, observer.back, observer.first_key) == (0, 1, 0)
    observe(observer, [0], [1], [[1, 5, 5]])        # the 6 has been seen
    assert observer.back == 2


def test_reads_of_one_call_have_no_order(kernel):
    observer = kernel.Observer(0, 2, 1, 100)
    observe(observer, [0, 0], [1, 1], [[1, 7], [1, 6]])
    assert observer.back == 0
    observe(observer, [0], [1], [[1, 6]])
    assert observer.back == 1


def test_shapes_are_checked(kernel):
    observer = kernel.Observer(0, 2, 1, 100)
    with pytest.raises(ValueError, match="one row"):
        observe(observer, [0], [1, 1], [[1, 7]])
    with pytest.raises(ValueError, match="one row"):
        observe(observer, [0], [1], [[1, 7, 7]])


def test_many_reads_are_thinned_out(kernel):
    observer = kernel.Observer(0, 1, 1, 8)
    for i in range(1, 101):
        observe(observer, [0], [i], [[i]])
    keys, rows = observer.views()
    assert 4 <= len(keys) <= 8
    assert (np.diff(rows[:, 0].astype(int)) > 0).all()
    assert rows[-1, 0] > 80
    assert observer.reads == 100


def chain(random, workers, count):
    """Return `count` vectors, each with one push more than the one before, in any order."""
    pushes = random.integers(workers, size=count)
    return random.permutation(np.cumsum(np.eye(workers, dtype=np.uint32)[pushes], axis=0, dtype=np.uint32))


@pytest.mark.parametrize("seed", range(5))
def test_a_chain_has_no_breaks(program, seed):
    rows = chain(np.random.default_rng(seed), 4, 500)
    assert program.count_breaks(rows) == 0
    assert program.count_breaks(np.concatenate((rows, rows[::3]))) == 0
    assert program.count_breaks(rows[:0]) == 0


@pytest.mark.parametrize("seed", range(5))
def test_two_reads_that_cannot_be_ordered_are_a_break(program, seed):
    rows = chain(np.random.default_rng(seed), 4, 500)
    other = rows[250].copy()
    largest = int(np.argmax(other))
    other[largest] -= 1
    other[(largest + 1) % 4] += 1
    assert program.count_breaks(np.concatenate((rows, other[np.newaxis]))) > 0
