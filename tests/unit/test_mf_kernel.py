"""The training loop of the matrix factorization against the same in NumPy, on a node of one process."""
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

kernel = pytest.importorskip("apps.mf._kernel", reason="the kernels are not built: make kernels")
import lapse  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
ROWS, COLS, LAMBDA = 13, 7, 0.5


def some_cells(count=60, seed=1):
    random = np.random.default_rng(seed)
    places = random.choice(ROWS * COLS, count, replace=False)
    cells = np.empty(count, dtype=kernel.CELL)
    cells["row"], cells["col"], cells["value"] = places // COLS, places % COLS, random.normal(size=count)
    return cells


def counts(cells):
    return np.bincount(cells["row"], minlength=ROWS), np.bincount(cells["col"], minlength=COLS)


def in_numpy(cells, w, h, eps):
    """One epoch, written down as plainly as it can be."""
    of_row, of_col = counts(cells)
    w, h = w.astype(np.float64), h.astype(np.float64)
    for i, j, x in cells.tolist():
        residual = x - w[i] @ h[j]
        w[i], h[j] = (w[i] + 2 * eps * (residual * h[j] - LAMBDA / of_row[i] * w[i]),
                      h[j] + 2 * eps * (residual * w[i] - LAMBDA / of_col[j] * h[j]))
    return w, h


@pytest.fixture
def trainers(serve):
    """trainers(rank, dtype, …) -> a Worker, its Trainer, and a function that returns W and H."""
    def make(rank, dtype="float64", cells=None, places=None, localize_rows=False, instructions=2, **settings):
        serve(rank, num_keys=ROWS + COLS, dtype=dtype, **settings)
        server = lapse.node._node.server()
        kv = lapse.Worker(0, server)
        trainer = kernel.Trainer(kv, rank=rank, double_precision=dtype == "float64", row_begin=0, row_end=ROWS, num_cols=COLS,
                                 column_key=ROWS, row_counts=counts(cells)[0], col_counts=counts(cells)[1], regularization=LAMBDA, seed=1,
                                 places=places, localize_rows=localize_rows, instructions=instructions)
        assert trainer.set_random(0, ROWS, 5, 0) == 0 and trainer.set_random(ROWS, ROWS + COLS, 6, 0) == 0

        def factors():
            values = kv.pull(np.arange(ROWS + COLS) if places is None else places)
            return values[:ROWS], values[ROWS:]
        return kv, trainer, factors
    return make


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 7, 8, 15, 16, 31, 33, 64, 100, 129])
@pytest.mark.parametrize("instructions", [0, 1, 2])
def test_an_epoch_is_that_of_numpy(trainers, rank, dtype, instructions):
    cells = some_cells()
    _, trainer, factors = trainers(rank, dtype, cells, instructions=instructions)
    w, h = factors()
    eps = 0.1 / rank
    expected = in_numpy(cells, w, h, eps)
    trainer.begin_epoch(eps)
    assert trainer.train(cells, False) == 0 and trainer.trained == len(cells)
    tolerance = 1e-6 if dtype == "float64" else 1e-4        # lambda / cells is a float32
    for found, right in zip(factors(), expected):
        np.testing.assert_allclose(found, right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("how", ["arrays", "far", "places", "far places"])
def test_all_ways_to_train_come_to_the_same(trainers, how):
    cells = some_cells()
    places = np.random.default_rng(2).permutation(ROWS + COLS) if "places" in how else None
    kv, trainer, factors = trainers(10, cells=cells, places=places, shared_memory="far" not in how)
    w, h = (matrix.copy() for matrix in factors())
    expected = in_numpy(cells, w, h, 0.01)
    if how == "arrays":
        kernel.train_arrays(cells, w, h, 0.01, *counts(cells), LAMBDA, 1, False)
        found = w, h
    else:
        trainer.begin_epoch(0.01)
        assert trainer.train(cells, False) == 0
        kv.waitall()
        found = factors()
    for matrix, right in zip(found, expected):
        np.testing.assert_allclose(matrix, right, rtol=1e-6)


@pytest.mark.parametrize("steps", [0, 1, 3, 100])
@pytest.mark.parametrize("localize_rows", [False, True])
def test_groups_train_on_their_runs_in_order(trainers, steps, localize_rows):
    cells = some_cells()
    _, trainer, factors = trainers(5, cells=cells, localize_rows=localize_rows)
    runs = np.array([[50, 60], [0, 20], [45, 50], [20, 21], [21, 45]])
    expected = in_numpy(np.concatenate([cells[a:b] for a, b in runs]), *factors(), 0.01)
    trainer.begin_epoch(0.01)
    assert trainer.train_groups(cells, runs, np.array([0, 2, 4, 5]), steps) == 0 and trainer.trained == 60
    for matrix, right in zip(factors(), expected):
        np.testing.assert_allclose(matrix, right, rtol=1e-6)


def test_shuffling_keeps_the_cells_and_their_runs(trainers):
    cells = some_cells()
    _, trainer, _ = trainers(5, cells=cells)
    shuffled = cells.copy()
    trainer.shuffle_runs(shuffled, np.array([[0, 30], [30, 60]]))
    for part in slice(0, 30), slice(30, 60):
        assert sorted(shuffled[part].tolist()) == sorted(cells[part].tolist()) and (shuffled[part] != cells[part]).any()
    first = np.zeros(6)
    for _ in range(6000):
        few = cells[:6].copy()
        trainer.shuffle_runs(few, np.array([[0, 6]]))
        first[few.tolist().index(cells[0].tolist())] += 1
    assert (abs(first - 1000) < 150).all()      # 5 standard deviations


def test_an_epoch_ends_early(trainers):
    cells = some_cells()
    _, trainer, _ = trainers(5, cells=cells)
    trainer.begin_epoch(0.01, 17)
    trainer.train(cells[:10])
    trainer.train(cells[10:])
    assert trainer.trained == 17 and not trainer.out_of_time
    trainer.begin_epoch(0.01, 0, -1.0)
    trainer.train(cells)
    assert trainer.trained == 0 and trainer.out_of_time


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_losses_are_those_of_numpy(trainers, dtype):
    cells = some_cells()
    _, trainer, factors = trainers(9, dtype, cells)
    w, h = factors()
    squares = ((cells["value"] - (w @ h.T)[cells["row"], cells["col"]]) ** 2).sum()
    assert trainer.squares(cells) == pytest.approx(squares, rel=1e-5)
    assert trainer.squares(cells, h.copy()) == pytest.approx(squares, rel=1e-5)
    some = cells[cells["col"] >= 3]
    assert trainer.squares(some, h[3:].copy(), 3) == pytest.approx(trainer.squares(some))
    assert trainer.norms(0, ROWS) == pytest.approx((w.astype(float) ** 2).sum(), rel=1e-5)
    assert trainer.norms(ROWS, ROWS + COLS) == pytest.approx((h.astype(float) ** 2).sum(), rel=1e-5)


def test_random_start_does_not_depend_on_who_sets_it(trainers):
    cells = some_cells()
    _, trainer, factors = trainers(40, cells=cells)
    w, h = (matrix.copy() for matrix in factors())
    assert w.min() > 0 and w.max() < 1 and abs(w.mean() - 0.5) < 0.05 and abs(np.corrcoef(w[0], w[1])[0, 1]) < 0.5
    assert (w[:COLS] != h).all()
    for begin, end in ((3, 9), (9, ROWS), (0, 3)):
        trainer.set_random(begin, end, 5, begin, 2.0)
    assert (factors()[0] == 2 * w).all()


def test_what_does_not_fit_is_refused(trainers):
    cells = some_cells()
    kv, trainer, _ = trainers(3, cells=cells)
    with pytest.raises(TypeError):
        trainer.train(cells["value"])
    with pytest.raises(TypeError):
        trainer.train(cells[::2])
    with pytest.raises(ValueError):
        kernel.Trainer(kv, rank=3, double_precision=True, row_begin=0, row_end=2, num_cols=2, column_key=2, row_counts=[1],
                       col_counts=[1, 1], regularization=1, seed=1)


def test_after_the_shutdown_the_kernel_says_so(trainers):
    cells = some_cells()
    _, trainer, _ = trainers(3, cells=cells)
    lapse.node._node.server().shutdown()
    trainer.begin_epoch(0.1)
    assert trainer.train(cells) < -1 and trainer.squares(cells) < -1 and trainer.norms(0, 3) < -1 and trainer.localize(0, 3) < -1


def scores(module, folder):
    """Compile a module with annotations; return its lines, and the score of each that has C code: 0 is C that calls no Python."""
    made = folder / f"{Path(module).stem}.c"
    done = subprocess.run([sys.executable, "-m", "cython", "-3", "-a", "-I", str(ROOT), "-X", "boundscheck=False", "-X", "wraparound=False",
                           "-X", "cdivision=True", "-X", "initializedcheck=False", "-o", str(made), module],
                          cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = {}
    for piece in made.with_suffix(".html").read_text().split('<pre class="cython line score-')[1:]:
        score, rest = piece.split('"', 1)
        found[int(rest.split('<span class="">')[1].split("</span>")[0].strip("+ :").split(":")[0])] = int(score)
    return (ROOT / module).read_text().splitlines(), found


def nogil_lines(lines):
    """Return {name: line numbers} of what runs without the GIL: bodies of nogil functions, and of `with nogil` in others."""
    found, name, inside = {}, "", None
    for number, line in enumerate(lines, 1):
        depth = len(line) - len(line.lstrip())
        if not line.strip() or (inside is not None and line.lstrip().startswith(")")):
            continue
        if inside is not None and depth <= inside:
            inside = None
        if inside is not None:
            found[name].append(number)
        elif match := re.match(r"\s*(?:cdef|def) [^=]*?(\w+)\(", line):
            name = match[1]
        if inside is None and (line.endswith("nogil:") and not line.lstrip().startswith("#")):
            inside = depth
            found.setdefault(name, [])
    return found


@pytest.mark.parametrize(("module", "least", "needed"), [
    ("apps/mf/_kernel.pyx", 150, {"update", "update_far", "shuffle", "shuffle_runs", "train", "train_groups", "keys_of", "localize_group",
                                  "localize", "set_random", "squares", "norms", "train_arrays"}),
    ("apps/mf/_cells.pyx", 100, {"parse_cells", "parse_numbers", "checksum", "count_shares", "scatter"})])
def test_what_runs_for_every_cell_calls_no_python(tmp_path, module, least, needed):
    """Reading, training and losses: no line of a loop without the GIL is yellow in the annotation."""
    lines, score = scores(module, tmp_path)
    loops = nogil_lines(lines)
    assert needed <= set(loops), needed - set(loops)
    checked = 0
    for name, numbers in loops.items():
        assert numbers, name
        for number in numbers:
            assert score.get(number, 0) == 0, f"{module}:{number}: {name} is not C alone: {lines[number - 1]}"
            checked += number in score
    assert checked > least, checked


def test_a_python_call_without_the_gil_is_seen(tmp_path):
    """The check above, on a module that has one."""
    path = tmp_path / "yellow.pyx"
    path.write_text("cdef int add(int i) noexcept nogil:\n    i += 1\n    with gil:\n        print(i)\n    return i\n")
    lines, score = scores(str(path), tmp_path)
    assert nogil_lines(lines) == {"add": [2, 3, 4, 5]} and score[4] > 0
