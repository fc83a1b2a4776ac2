"""The matrix factorization as a job: what it learns on one and several nodes, its options, and what it says of bad input."""
import re
import resource
import shutil
import sys

import numpy as np
import pytest
from launched import ROOT

pytest.importorskip("apps.mf._kernel", reason="the kernels are not built: make kernels")

PROGRAM = "apps/matrix_factorization.py"
TOY = ROOT / "apps/data/mf"
RATINGS = ROOT / "apps/data/ratings"
EPOCH = re.compile(r"epoch (\d+):.* loss (\S+) train (\S+) test, RMSE (\S+) train (\S+) test")


@pytest.fixture
def data(tmp_path):
    """Copies of the data of this tree, so that no cache is written into it."""
    for source in TOY, RATINGS:
        shutil.copytree(source, tmp_path / source.name, ignore=shutil.ignore_patterns("*.cache"))
    return tmp_path


def losses(result, code=0):
    """Return [train loss, test loss, train RMSE, test RMSE] per epoch, from 0."""
    assert result.code == code, result.text
    found = [match for line in result.lines if (match := EPOCH.match(line))]
    assert [int(match[1]) for match in found] == list(range(len(found))) and found, result.text
    return np.array([[float(word) for word in match.groups()[1:]] for match in found])


# --- learning ---------------------------------------------------------------------------------------------------------------------

def test_the_command_of_the_toy_data(jobs, data):
    result = jobs.run(sys.executable, "tracker/dmlc_local.py", "-s", 2, sys.executable, PROGRAM, "--dataset", f"{data}/mf/", "-r", 2,
                      "--num_rows", 6, "--num_cols", 4, "--epochs", 10)
    found = losses(result)
    assert len(found) == 11 and (np.diff(found[:, 0]) < 0).all() and found[-1, 1] < found[0, 1]
    assert "matrix_factorization: OK (2 nodes x 1 workers, 10 epochs" in result.text


RANK10 = ["-r", 10, "-l", 5, "--eps", 0.005, "--init_scale", 0.1, "-e", 20]


@pytest.mark.parametrize("algorithm", ["dsgd", "columnwise", "plain_sgd"])
def test_nodes_and_threads_agree(jobs, data, algorithm):
    """Each runs through the cells in another order; the losses are within 1 % of each other all the same."""
    ahead = [] if algorithm == "dsgd" else ["--prelocalize_steps", 2, "--prelocalize_groupsize", 100]
    options = ["-d", data / "ratings", "--algorithm", algorithm, *ahead, *RANK10]
    alone = losses(jobs.run(sys.executable, PROGRAM, *options))
    assert alone[-1, 3] < 0.8 < 1.1 < alone[0, 3]
    for nodes, threads in ((1, 2), (2, 1)):
        found = losses(jobs.launch(nodes, PROGRAM, *options, "-t", threads))
        np.testing.assert_allclose(found[0], alone[0], rtol=1e-5)
        np.testing.assert_allclose(found[-1], alone[-1], rtol=0.01)


@pytest.mark.parametrize("options", [
    "-t 3", "--dtype float32", "--enforce_random_keys 1", "--prevent_full_model_pull 1", "--shared_memory 0", "--sync_push 1 -t 2",
    "--disable_localize_blocks 1", "--disable_localize_left 1 --sync_push 1", "--wor_blocks 0 --wor_points 0",
    "--sys.location_caches 1 --disable_localize_blocks 1", "--algorithm columnwise --prelocalize_steps 3",
    "--algorithm columnwise --wor_points 0", "--algorithm plain_sgd --prelocalize_steps 1 --disable_localize_left 1",
    "--algorithm plain_sgd --prelocalize_steps 2 --enforce_random_keys 1 --dtype float32 -t 2"])
def test_every_way_learns_the_same(jobs, data, options):
    options = options.split()
    few = ["-d", data / "ratings", *RANK10[:-1], 2, "--eps", 0.02]
    found = losses(jobs.launch(2, PROGRAM, *few, *options))
    assert found[0, 0] == pytest.approx(1.2638, rel=1e-4) and found[0, 1] == pytest.approx(1.33702, rel=1e-4)
    assert found[2, 0] == pytest.approx(1.2427, rel=0.003) and found[2, 3] < found[1, 3] < found[0, 3]


def test_bold_driver_changes_the_step(jobs, data):
    def steps(*options):
        result = jobs.run(sys.executable, PROGRAM, "-d", data / "mf", "-r", 2, "-e", 3, "--eps", 0.01, *options)
        losses(result)
        return [float(word) for word in re.findall(r" step (\S+),", result.text)]
    assert steps() == pytest.approx([0.01, 0.0105, 0.011025])
    assert steps("--increase_step_factor", 1.5) == pytest.approx([0.01, 0.015, 0.0225])
    assert steps("--bold_driver", "off") == pytest.approx([0.01] * 3)
    result = jobs.run(sys.executable, PROGRAM, "-d", data / "mf", "-r", 2, "-e", 8, "--eps", 0.1, "--increase_step_factor", 2,
                      "--decrease_step_factor", 0.25)
    train = losses(result)[:, 0]
    found = [float(word) for word in re.findall(r" step (\S+),", result.text)]
    expected = [2 if after < before else 0.25 for before, after in zip(train, train[1:-1])]
    assert set(expected) == {2, 0.25}
    assert np.divide(found[1:], found[:-1]).tolist() == pytest.approx(expected, rel=1e-4)


def test_the_seeds_say_what_is_random(jobs, data):
    def run(*options):
        return losses(jobs.run(sys.executable, PROGRAM, "-d", data / "ratings", *RANK10[:-1], 1, *options)).tolist()
    once = run()
    assert run() == once
    other = run("--seed", 2)
    assert other[0] == once[0] and other[1] != once[1]
    assert run("--model_seed", 5)[0] != once[0]


def test_output_is_the_model_and_a_start(jobs, data):
    out = data / "new" / "out"
    result = jobs.launch(2, PROGRAM, "-d", data / "ratings", *RANK10, "--output", out)
    last = losses(result)[-1]
    w, h = np.load(out / "W.npy"), np.load(out / "H.npy")
    assert w.shape == (600, 10) and h.shape == (10, 400)
    test = np.loadtxt(data / "ratings/test.mmc", skiprows=2)
    residuals = test[:, 2] - (w @ h)[test[:, 0].astype(int) - 1, test[:, 1].astype(int) - 1]
    assert np.sqrt((residuals**2).mean()) == pytest.approx(last[3], rel=1e-4)
    assert sorted(path.name for path in out.iterdir()) == ["H.mma", "H.npy", "W.mma", "W.npy"]
    assert np.loadtxt(out / "W.mma", skiprows=2).reshape(10, 600).T.tolist() == w.tolist()
    for name in "W.mma", "H.mma":
        shutil.copy(out / name, data / "ratings" / name)
    again = losses(jobs.launch(2, PROGRAM, "-d", data / "ratings", *RANK10[:-1], 0, "--init_parameters", 1))
    np.testing.assert_allclose(again[0], last, rtol=1e-5)


def test_max_runtime_ends_cleanly_and_writes_the_output(jobs, data):
    result = jobs.launch(2, PROGRAM, "-d", data / "ratings", "-r", 100, "-e", 1000000, "--max_runtime", 1, "--output", data / "out")
    assert result.code == 0 and "matrix_factorization: stopped by --max_runtime" in result.text
    assert np.isfinite(np.load(data / "out/W.npy")).all()


def test_early_stop_and_no_losses(jobs, data):
    result = jobs.launch(2, PROGRAM, "-d", data / "ratings", "-r", 3, "-e", 2, "--early_stop", 100, "--compute_loss", 0, "--report",
                         data / "report")
    assert result.code == 0 and "RMSE" not in result.text
    rows = (data / "report").read_text().splitlines()
    assert len(rows) == 2 and all('"points": 200,' in row and '"train_loss": null' in row for row in rows)


# --- bad input ----------------------------------------------------------------------------------------------------------------------

def spoil(data, case):
    """Make one thing wrong; return options, and what has to be said."""
    toy = data / "mf"
    options = {"-d": toy, "-r": 2, "-e": 2}
    train, test = toy / "train.mmc", toy / "test.mmc"
    if case == "no folder":
        options["-d"], what = data / "none", "none/train.mmc: No such file"
    elif case == "no test":
        test.unlink()
        what = "test.mmc: No such file"
    elif case == "malformed":
        train.write_text(train.read_text().replace("\n1 2 ", "\n1 two ", 1))
        what = r"train.mmc:5: the line is not"
    elif case == "outside":
        train.write_text(train.read_text().replace("\n1 2 ", "\n1 9 ", 1))
        what = r"train.mmc:5: the line has column 9, outside of the matrix of 6 x 4"
    elif case == "nan":
        test.write_text(re.sub(r"\n(2 4) .*", r"\n\1 nan", test.read_text()))
        what = r"test.mmc:5: the line has the value nan"
    elif case == "empty test":
        test.write_text("%%MatrixMarket matrix coordinate real general\n6 4 0\n")
        what = "test.mmc has no cells"
    elif case == "rows":
        options["--num_rows"], what = 7, "--num_rows is 7, but .*train.mmc has 6"
    elif case == "sizes":
        test.write_text("%%MatrixMarket matrix coordinate real general\n6 5 1\n1 1 1\n")
        what = "test.mmc is of 6 x 5, but .*train.mmc of 6 x 4"
    elif case == "factors":
        options["-r"], options["--init_parameters"], what = 3, 1, "W.mma is a matrix of 6 x 2, but here it has to be 6 x 3"
    elif case == "output":
        (data / "file").write_text("")
        options["--output"], what = data / "file", "--output .*file: File exists"
    elif case == "output below a file":
        options["--output"], what = train / "out", "--output .*train.mmc/out: Not a directory"
    elif case == "a folder in the way of the output":
        (data / "model/H.mma").mkdir(parents=True)
        options["--output"], what = data / "model", "--output .*model/H.mma: Is a directory"
    elif case == "report":
        options["--report"], what = data / "none" / "report", "--report .*none/report: No such file"
    elif case == "infinity":
        train.write_text(re.sub(r"\n1 2 .*", r"\n1 2 -inf", train.read_text()))
        what = r"train.mmc:5: the line has the value -inf"
    elif case == "cut":
        train.write_text(train.read_text()[:-12])
        what = r"train.mmc:\d+: (ends after \d+ cells, but its size line says 18|the line is not)"
    elif case == "no size line":
        train.write_text(train.read_text().split("\n")[0] + "\n")
        what = r"train.mmc:2: there is no size line"
    elif case == "a folder":
        test.unlink()
        test.mkdir()
        what = "test.mmc: Is a directory"
    elif case == "columns":
        options["--num_cols"], what = 5, "--num_cols is 5, but .*train.mmc has 4"
    elif case == "no factors":
        (toy / "W.mma").unlink()
        options["--init_parameters"], what = 1, "W.mma: No such file"
    return [word for pair in options.items() for word in pair], what


CASES = ["no folder", "no test", "malformed", "outside", "nan", "empty test", "rows", "sizes", "factors", "output",
         "output below a file", "a folder in the way of the output", "report", "infinity", "cut", "no size line", "a folder", "columns",
         "no factors"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("nodes", [0, 2])
def test_bad_input_is_one_sentence(jobs, data, case, nodes):
    options, what = spoil(data, case)
    result = jobs.launch(nodes, PROGRAM, *options) if nodes else jobs.run(sys.executable, PROGRAM, *options)
    assert result.code == 2, result.text
    assert re.search(what, result.text) and "Traceback" not in result.text, result.text
    said = [line for line in result.lines if line.startswith("matrix_factorization: ")]
    assert 1 <= len(said) <= max(nodes, 1)
    assert not list(data.rglob("*.part")) and not (data / "out").exists()


def test_a_cache_that_cannot_be_written_is_done_without(jobs, data):
    """Two nodes, and a folder where the cache would be: each has its cells in an unnamed file."""
    (data / "mf/train.mmc.cache").mkdir()
    result = jobs.launch(2, PROGRAM, "-d", data / "mf", "-r", 2, "-e", 2)
    assert len(losses(result)) == 3 and result.text.count("no cache beside") == 2
    assert not list(data.rglob("*.part"))


def test_a_cache_of_another_text_or_a_cut_one_is_made_anew(jobs, data):
    """The text changes, then the cache is cut: the next job takes neither what was nor what is left of it."""
    def first():
        return losses(jobs.launch(2, PROGRAM, "-d", data / "mf", "-r", 2, "-e", 1))[0, 0]
    train, cache = data / "mf/train.mmc", data / "mf/train.mmc.cache"
    once = first()
    train.write_text(re.sub(r"\n1 2 .*", r"\n1 2 9", train.read_text()))
    other = first()
    assert other != once
    cache.write_bytes(cache.read_bytes()[:-20])
    assert first() == other


@pytest.mark.parametrize(("options", "what"), [
    ("-r 0", "too small"), ("-r -1", "too small"), ("-r two", "not a whole number"), ("--eps 0", "not above 0"),
    ("--eps nan", "not above 0"), ("--lambda -1", "not above 0"), ("--algorithm als", "invalid choice"),
    ("--prelocalize_steps 2", "nothing to prelocalize"), ("--algorithm columnwise --disable_localize_blocks 1", "has no blocks"),
    ("--replicate 5", "reserved"), ("--dtype int32", "invalid choice"),
    ("--init_parameters 3", "invalid choice"), ("--wor_points maybe", "truth value")])
def test_a_wrong_option_is_refused(jobs, data, options, what):
    result = jobs.run(sys.executable, PROGRAM, "-d", data / "mf", "-r", 2, "-e", 1, *options.split())
    assert result.code == 2 and what in result.text and "Traceback" not in result.text


def test_needed_options(jobs):
    result = jobs.run(sys.executable, PROGRAM)
    assert result.code == 2 and "--dataset" in result.text and "--rank" in result.text and "--epochs" in result.text
    assert jobs.run(sys.executable, PROGRAM, "--help").code == 0


@pytest.mark.parametrize("nodes", [0, 2])
def test_factors_that_diverge_end_the_job(jobs, data, nodes):
    command = [PROGRAM, "-d", data / "mf", "-r", 2, "-e", 50, "--eps", 50, "--output", data / "out"]
    result = jobs.launch(nodes, *command) if nodes else jobs.run(sys.executable, *command)
    assert result.code == 1 and "the factors have diverged in epoch" in result.text and "Traceback" not in result.text
    assert not list((data / "out").iterdir())


LIMITED = f"import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), {resource.RLIM_INFINITY})); " \
          "os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"


def test_a_disk_that_fills_up_leaves_nothing_half_written(jobs, data):
    """A limit of the size of files stands for the disk."""
    command = [PROGRAM, "-d", data / "ratings", "-r", 100, "-e", 1]
    result = jobs.run(sys.executable, "-c", LIMITED, 100_000, *command)
    assert result.code == 2 and "no room for its cells" in result.text and "Traceback" not in result.text
    assert sorted(path.name for path in (data / "ratings").iterdir()) == ["test.mmc", "train.mmc"]
    result = jobs.run(sys.executable, "-c", LIMITED, 400_000, *command, "--output", data / "out")       # W.npy is larger
    assert result.code == 1 and "out/W.npy: File too large" in result.text and "Traceback" not in result.text, result.text
    assert not list((data / "out").iterdir())


def test_a_full_disk_of_one_node_ends_the_others(jobs, data):
    script = ("import os, resource, sys\n"
              "if os.environ.get('LAPSE_RANK') == '0':\n"
              f"    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, {resource.RLIM_INFINITY}))\n"
              "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])\n")
    result = jobs.launch(2, "-c", script, PROGRAM, "-d", data / "ratings", "-r", 100, "-e", 1, "--output", data / "out")
    assert result.code == 1 and "out/W.npy: File too large" in result.text, result.text
    assert not list((data / "out").iterdir())


def test_without_its_kernel_the_program_fails(jobs, data):
    argv = [PROGRAM, "-d", str(data / "mf"), "-r", "2", "-e", "1"]
    hide = f"import sys, runpy; sys.modules['apps.mf._kernel'] = None; sys.argv = {argv}; " \
           f"runpy.run_path({PROGRAM!r}, run_name='__main__')"
    assert jobs.run(sys.executable, "-c", hide).code != 0
