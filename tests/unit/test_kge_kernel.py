"""The training loop of the knowledge-graph embeddings against the same in NumPy, and against numerical differentiation."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

kernel = pytest.importorskip("apps.kge._kernel", reason="the kernels are not built: make kernels")
import lapse  # noqa: E402
from apps.kge.evaluation import queries_of  # noqa: E402
from apps.kge.layout import Layout  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
NEXT = ("    cdef ", "    def ", "    # ---", "cdef ", "def ")      # what a method ends before
ENTITIES, RELATIONS = 37, 3
ETA, GAMMA_E, GAMMA_R = 0.1, 0.01, 0.02


def some_triples(count=25, seed=1):
    random = np.random.default_rng(seed)
    return np.stack((random.integers(ENTITIES, size=count), random.integers(RELATIONS, size=count), random.integers(ENTITIES, size=count)),
                    axis=1).astype(np.int32)


# --- the same in NumPy -------------------------------------------------------------------------------------------------------------------

def score(rescal, s, r, o):
    """The score of a triple, by the definition of the model."""
    if rescal:
        return s @ r.reshape(len(s), -1) @ o
    half = len(s) // 2
    s, r, o = (part[:half] + 1j * part[half:] for part in (s, r, o))
    return (s * r * o.conj()).sum().real


def gradients(rescal, s, r, o):
    """Those of the score: it is linear in each of the three."""
    def of(size, at):
        return np.array([at(row) for row in np.eye(size)])
    return (of(len(s), lambda x: score(rescal, x, r, o)), of(len(r), lambda x: score(rescal, s, x, o)),
            of(len(o), lambda x: score(rescal, s, r, x)))


def adagrad(row, gradient, gamma):
    x = gradient + gamma * row[0]
    row[1] += x * x
    row[0] -= ETA * x / np.sqrt(row[1])


def in_numpy(rescal, triples, entities, relations, draws, negatives, group):
    """One epoch, written down as plainly as it can be; returns the loss. entities, relations: [n, 2, numbers]."""
    loss, draws = 0.0, iter(draws)
    for s, r, o in triples.tolist():
        drawn = [next(draws) for _ in range(2 * negatives)]
        three = [entities[s].copy(), relations[r].copy(), entities[o].copy()]
        start = [row.copy() for row in three]
        groups, at, turn = [([], 1, 0)], 0, 0
        while at < 2 * negatives:
            size = min(group, negatives - turn // 2 * group)
            groups.append((drawn[at:at + size], 0, 1 - turn % 2))
            at, turn = at + size, turn + 1
        total = [np.zeros_like(row[0]) for row in three]
        for members, truth, subject in groups:
            summed = [np.zeros_like(row[0]) for row in three]
            steps = []
            for member in members or [None]:
                row = three[2] if member is None else entities[member]
                parts = [three[0][0], three[1][0], three[2][0]]
                if rescal:                      # all scores of a triple see the same subject, relation and object
                    parts = [start[0][0], start[1][0], start[2][0]]
                parts[0 if subject else 2] = row[0].copy()
                x = score(rescal, *parts)
                loss += np.logaddexp(0, -x if truth else x)
                f = 1 / (1 + np.exp(-x)) - truth
                found = [f * part for part in gradients(rescal, *parts)]
                steps.append((row, found[0 if subject else 2]))
                for k in (1, 2 if subject else 0):
                    summed[k] += found[k]
            for row, gradient in steps:
                adagrad(row, gradient, GAMMA_E)
            for k in (1, 2 if subject else 0):
                if rescal:
                    total[k] += summed[k]
                else:
                    adagrad(three[k], summed[k], len(steps) * (GAMMA_R if k == 1 else GAMMA_E))
        if rescal:
            adagrad(three[1], total[1], (1 + 2 * negatives) * GAMMA_R)
            for k in (0, 2):
                adagrad(three[k], total[k], (1 + negatives) * GAMMA_E)
        for row, before, after in (entities[s], start[0], three[0]), (relations[r], start[1], three[1]), (entities[o], start[2], three[2]):
            row += after - before
    return loss


def pattern(count):
    """What the sampler of these tests draws."""
    return (np.arange(count) * 7 + np.arange(count) // 5) % ENTITIES


@pytest.fixture
def trainers(serve):
    """trainers(dim, …) -> a Worker, its Trainer, and a function that returns the parameters of entities and relations."""
    def make(dim, rescal=False, dtype="float64", negatives=3, parts=1, places=None, size=0.5, sums=0.1, **more):
        settings = {"shared_memory": more.pop("shared_memory", True)}
        layout = Layout(ENTITIES, RELATIONS, dim, rescal, parts, places)
        server = serve(layout.lengths(0), num_keys=layout.keys, dtype=dtype, **settings)
        drawn = [0]

        def draw(rng, n):
            drawn[0] += n
            keys = pattern(drawn[0])[-n:]
            return keys if places is None else places[keys]
        server.enable_sampling_support(distribution=draw, min=0, max=layout.keys)
        kv = lapse.Worker(0, server)
        trainer = kernel.Trainer(kv, rescal=rescal, double_precision=dtype == "float64", dim=dim, num_entities=ENTITIES,
                                 negatives=negatives, eta=ETA, gamma_entity=GAMMA_E, gamma_relation=GAMMA_R, parts=parts,
                                 lines=layout.lines, places=places, **more)
        random = np.random.default_rng(4)
        for kind, begin, end in layout.blocks():
            shape = (end - begin, dim * dim if kind and rescal else dim)
            layout.set(kv, kind, begin, end, random.normal(size=shape, scale=size).astype(dtype), np.full(shape, sums, dtype=dtype))

        def model():
            return [np.stack(layout.pull(kv, kind, 0, count), axis=1).astype(np.float64)
                    for kind, count in ((0, ENTITIES), (1, RELATIONS))]
        return kv, trainer, model
    return make


def agree(trainers, dim, rescal=False, negatives=3, group=1, tolerance=1e-9, count=25, **more):
    triples = some_triples(count)
    kv, trainer, model = trainers(dim, rescal=rescal, negatives=negatives, group=group, **more)
    entities, relations = model()
    loss = in_numpy(rescal, triples, entities, relations, pattern(2 * negatives * count), negatives, group if not rescal else negatives)
    trainer.begin_epoch()
    assert trainer.train(triples) == 0 and trainer.trained == count
    kv.waitall()
    assert trainer.loss == pytest.approx(loss, rel=tolerance)
    for found, expected in zip(model(), (entities, relations)):
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("dim", [2, 6, 14, 32, 66, 100])
@pytest.mark.parametrize("instructions", [0, 1, 2])
def test_complex_is_that_of_numpy(trainers, dim, dtype, instructions):
    agree(trainers, dim, dtype=dtype, instructions=instructions, count=8, tolerance=1e-9 if dtype == "float64" else 2e-3)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("dim", "parts"), [(1, 1), (5, 1), (6, 3), (12, 12), (17, 1)])
def test_rescal_is_that_of_numpy(trainers, dim, parts, dtype):
    agree(trainers, dim, rescal=True, parts=parts, dtype=dtype, count=8, tolerance=1e-9 if dtype == "float64" else 2e-3)


@pytest.mark.parametrize("group", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("negatives", [0, 1, 5, 20])
def test_groups_of_negatives(trainers, group, negatives):
    agree(trainers, 4, negatives=negatives, group=group, count=6)


@pytest.mark.parametrize("rescal", [False, True])
@pytest.mark.parametrize("more", [{"places": True}, {"ahead": 3}, {"ahead": 10, "together": 5}, {"ahead": 3, "together": 7},
                                  {"ahead": 100, "together": 50, "localize_relations": False}], ids=str)
def test_ways_to_find_parameters(trainers, rescal, more):
    if "places" in more:
        more = {"places": np.random.default_rng(2).permutation(ENTITIES + RELATIONS * (2 if rescal else 1)).astype(np.int64)}
    agree(trainers, 6, rescal=rescal, parts=2 if rescal else 1, **more)


def test_far_parameters_come_last_but_nothing_is_lost(trainers):
    """Without shared memory everything is pulled and pushed; a triple's negatives then see each other's copies from before."""
    triples = some_triples(12)
    for rescal in (False, True):
        found = []
        for shared_memory in (True, False):
            kv, trainer, model = trainers(6, rescal=rescal, negatives=1, shared_memory=shared_memory)
            trainer.begin_epoch()
            assert trainer.train(triples) == 0
            kv.waitall()
            found.append(model())
            kv.finalize()
            lapse.node._node.server().shutdown()
        for one, other in zip(*found):
            np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize("rescal", [False, True])
def test_the_gradient_is_the_derivative_of_the_loss(trainers, rescal):
    """One triple without negatives; out of AdaGrad's step the gradient is -change * sqrt(new sum) / eta."""
    _kv, trainer, model = trainers(6, rescal=rescal, negatives=0)
    triple = np.array([[2, 1, 7]], dtype=np.int32)
    before = model()
    trainer.begin_epoch()
    assert trainer.train(triple) == 0
    after = model()

    def loss(entities, relations):
        penalty = (GAMMA_E * ((entities[2] ** 2).sum() + (entities[7] ** 2).sum()) + GAMMA_R * (relations[1] ** 2).sum()) / 2
        return np.logaddexp(0, -score(rescal, entities[2], relations[1], entities[7])) + penalty
    for which, rows in (0, (2, 7)), (1, (1,)):
        for row in rows:
            found = -(after[which][row, 0] - before[which][row, 0]) * np.sqrt(after[which][row, 1]) / ETA
            if rescal and (which, row) == (0, 7):
                continue        # its own score and the relation's share are two steps, which the comparison with NumPy covers
            for k in range(len(found)):
                sides = []
                for h in (1e-6, -1e-6):
                    moved = [before[0][:, 0].copy(), before[1][:, 0].copy()]
                    moved[which][row, k] += h
                    sides.append(loss(*moved))
                assert found[k] == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-5, abs=1e-8)


def test_queries_are_the_scores(trainers):
    random = np.random.default_rng(3)
    s, o = random.normal(size=(2, 4, 6))
    for rescal, r in (False, random.normal(size=(4, 6))), (True, random.normal(size=(6, 6))):
        q, p = queries_of(rescal, s, r, o)
        for i in range(4):
            right = score(rescal, s[i], r.ravel() if rescal else r[i], o[i])
            assert q[i] @ o[i] == pytest.approx(right) and p[i] @ s[i] == pytest.approx(right)


def test_extreme_scores_have_finite_losses_and_nan_shows(trainers):
    for size in (30.0, 1e4):
        _, trainer, model = trainers(6, size=size)
        trainer.begin_epoch()
        assert trainer.train(some_triples()) == 0 and np.isfinite(trainer.loss) and np.isfinite(model()[0]).all()
        lapse.node._node.server().shutdown()
    _, trainer, _ = trainers(6, size=np.nan)
    trainer.begin_epoch()
    assert trainer.train(some_triples()) == 0 and np.isnan(trainer.loss)


def test_an_epoch_ends_early(trainers):
    _, trainer, _ = trainers(4, ahead=5, together=4)
    triples = some_triples()
    trainer.begin_epoch(17)
    trainer.train(triples[:10])
    assert trainer.trained == 10
    trainer.train(triples[10:])
    assert trainer.trained == 17 and not trainer.out_of_time
    trainer.begin_epoch(-1, -1.0)
    trainer.train(triples)
    assert trainer.trained == 0 and trainer.out_of_time


def test_skipped_draws_are_those_of_an_epoch(trainers):
    found = []
    for skip in (False, True):
        kv, trainer, model = trainers(4, negatives=2)
        start = model()
        trainer.begin_epoch()
        if skip:
            assert trainer.skip_draws(25) == 0
        else:
            assert trainer.train(some_triples()) == 0
            for begin, rows in (0, start[0]), (ENTITIES, start[1]):
                kv.set(np.arange(begin, begin + len(rows)), rows.reshape(len(rows), -1))
            trainer.begin_epoch()
        assert trainer.train(some_triples(seed=2)) == 0
        found.append(model())
        kv.finalize()
        lapse.node._node.server().shutdown()
    assert all((one == other).all() for one, other in zip(*found))


def test_after_the_shutdown_the_kernel_says_so(trainers):
    _, trainer, _ = trainers(4)
    lapse.node._node.server().shutdown()
    trainer.begin_epoch()
    assert trainer.train(some_triples()) < -1


def test_loops_of_the_arithmetic_are_vectorized():
    """The square root of a whole vector is there: without -fno-math-errno it is not."""
    if sys.platform != "linux" or not hasattr(kernel, "__file__"):
        pytest.skip("needs objdump")
    try:
        done = subprocess.run(["objdump", "-d", kernel.__file__], capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("needs objdump")
    if "x86-64" not in done.stdout.splitlines()[1]:
        pytest.skip("another processor")
    from lapse._build import kind
    if kind == "release":
        assert "sqrtps" in done.stdout and "sqrtpd" in done.stdout


def test_the_training_loop_calls_no_python(tmp_path):
    """What runs for every triple is C: no line of its annotation is yellow."""
    done = subprocess.run([sys.executable, "-m", "cython", "-3", "-a", "-I", str(ROOT), "-X", "boundscheck=False", "-X", "wraparound=False",
                           "-X", "cdivision=True", "-X", "initializedcheck=False", "-o", str(tmp_path / "k.c"), "apps/kge/_kernel.pyx"],
                          cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    html = (tmp_path / "k.html").read_text()
    source = (ROOT / "apps/kge/_kernel.pyx").read_text().splitlines()
    scores = {}
    for piece in html.split('<pre class="cython line score-')[1:]:
        score_, rest = piece.split('"', 1)
        number = int(rest.split("<span class=\"\">")[1].split("</span>")[0].strip("+ :").split(":")[0])
        scores[number] = int(score_)
    checked = 0
    for name in ("call_back", "fetch", "give_back", "push_change", "train_group", "corrupt", "size_of", "rescal_forward", "rescal_backward",
                 "train_triple", "prepare", "draw"):
        begin = next(i for i, line in enumerate(source) if line.startswith("    cdef ") and f" {name}(" in line)
        end = next(i for i in range(begin + 1, len(source)) if source[i].startswith(NEXT))
        for line in range(begin + 2, end + 1):
            assert scores.get(line, 0) == 0, f"line {line} of the loop: {source[line - 1]}"
            checked += line in scores
    assert checked > 100
