"""The training loop of the word vectors against the same in NumPy, on a node of one process."""
import os
import resource

import numpy as np
import pytest

kernel = pytest.importorskip("apps.w2v._kernel", reason="the kernels are not built: make kernels")
from apps.w2v._text import Vocabulary  # noqa: E402

import lapse  # noqa: E402
from lapse import _build  # noqa: E402

WORDS = 11


def some_text(path, sentences=40, seed=1):
    """Write sentences of up to 12 words; return them as lists of numbers of words."""
    random = np.random.default_rng(seed)
    found = [random.integers(0, WORDS, random.integers(0, 13)).tolist() for _ in range(sentences)]
    path.write_text("".join(" ".join(f"w{word}" for word in sentence) + "\n" for sentence in found))
    return found


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


class Draws:
    """A callable that hands out the same draws again, in the order in which they come."""

    def __init__(self, keys):
        self.keys, self.at = keys, 0

    def __call__(self, rng, n):
        self.at += n
        return self.keys[self.at - n:self.at]


def in_numpy(sentences, inputs, outputs, draws, negative, alpha):
    """One iteration with a window of 1, without subsampling, written down as plainly as it can be; returns the pairs and their loss."""
    pairs, loss = 0, 0.0
    for sentence in sentences:
        for i, word in enumerate(sentence):
            for j in (i - 1, i + 1):
                if not 0 <= j < len(sentence):
                    continue
                others = [other for other in next(draws)[:negative] if other != word]
                for group in filter(None, ([word, *others[:15]], others[15:30])):
                    h = inputs[sentence[j]].copy()
                    scores = outputs[group] @ h
                    right = np.array(group) == word
                    loss -= np.log(sigmoid(np.where(right, scores, -scores))).sum()
                    for target, g in zip(group, alpha * (right - sigmoid(scores))):
                        inputs[sentence[j]] += g * outputs[target]
                        outputs[target] += g * h
                pairs += 1
    return pairs, loss


@pytest.fixture
def trainers(serve, tmp_path):
    """trainers(dim, negative, …) -> a function that trains for an iteration, and what NumPy makes of it."""
    def make(dim, negative, dtype="float64", instructions=2, ahead=3, alpha=0.05, **settings):
        sentences = some_text(tmp_path / "text")
        vocabulary = Vocabulary()
        for word in range(WORDS):
            vocabulary.add(b"w%d" % word, 5)
        places = np.random.default_rng(4).permutation(2 * WORDS + 3)[:2 * WORDS]
        drawn = np.random.default_rng(5).integers(0, WORDS, (10_000, max(negative, 1)))
        server = serve(dim, num_keys=2 * WORDS + 3, dtype=dtype, **settings)
        server.enable_sampling_support(distribution=Draws(places[2 * drawn.ravel() + 1]), seed=1, batch_size=1000)
        kv = lapse.Worker(0, server)
        start = np.random.default_rng(6).normal(size=(2, WORDS, dim)) / dim**0.5
        for which in 0, 1:
            kv.set(places[which::2].copy(), np.ascontiguousarray(start[which], dtype=dtype))
        trainer = kernel.Trainer(kv, vocabulary, places, dim=dim, double_precision=dtype == "float64", window=1, negative=negative,
                                 subsample=0, alpha=alpha, seed=1, ahead=ahead, localize=True, instructions=instructions)
        trainer.lowest_alpha = alpha        # the same all the time
        fd = os.open(tmp_path / "text", os.O_RDONLY)
        try:
            trainer.begin_iteration(fd, 0, os.fstat(fd).st_size, 1, 0)
            while (result := trainer.train(50)) == 1:
                pass
        finally:
            os.close(fd)
        assert result == 0
        inputs, outputs = start
        pairs, loss = in_numpy(sentences, inputs, outputs, iter(drawn.tolist()), negative, alpha)
        assert trainer.pairs == pairs > 100 and trainer.words == trainer.read == sum(map(len, sentences))
        tolerance = 2e-4 if dtype == "float32" else 1e-4        # the sigmoid comes from a table
        np.testing.assert_allclose(kv.pull(places[::2].copy()), inputs, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(kv.pull(places[1::2].copy()), outputs, rtol=tolerance, atol=tolerance)
        assert trainer.loss == pytest.approx(loss, rel=1e-4)
        kv.finalize()
    return make


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("dim", [1, 2, 3, 4, 7, 8, 15, 16, 31, 33, 64, 100, 129])
@pytest.mark.parametrize("instructions", [0, 1, 2])
def test_an_iteration_is_that_of_numpy(trainers, dim, dtype, instructions):
    trainers(dim, 1, dtype, instructions)


@pytest.mark.parametrize("ahead", [0, 1, 10, 1000])
def test_looking_ahead_changes_nothing(trainers, ahead):
    trainers(10, 1, ahead=ahead)


@pytest.mark.parametrize("negative", [2, 3, 5, 7, 8, 14, 15, 16, 17, 25])
def test_any_number_of_negatives(trainers, negative):
    trainers(20, negative)


@pytest.mark.skipif(_build.kind in ("asan", "tsan"), reason="a sanitizer ends the process where there is no memory")
def test_tables_that_do_not_fit_are_refused(serve):
    """2 x window x negatives is more than an int can tell."""
    vocabulary = Vocabulary()
    vocabulary.add(b"w", 5)
    kv = lapse.Worker(0, serve(4))
    limit = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 36, limit[1]))
    try:
        with pytest.raises(MemoryError, match="a worker's tables"):
            kernel.Trainer(kv, vocabulary, np.arange(2), dim=4, double_precision=False, window=1 << 16, negative=1 << 20, subsample=0,
                           alpha=0.1, seed=1)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)
    kv.finalize()


def test_without_negatives(trainers):
    trainers(10, 0)
