"""The word vectors as a job: what it learns on one and several nodes, its files, its options, and what it says of bad input."""
import json
import os
import re
import resource
import sys

import numpy as np
import pytest
from launched import ROOT

pytest.importorskip("apps.w2v._kernel", reason="the kernels are not built: make kernels")

PROGRAM = "apps/word2vec.py"
SMALL = ROOT / "apps/data/lm/small.txt"
EPOCH = re.compile(r"epoch (\d+): .* s, loss (\S+), ")
QUICK = ["-f", SMALL, "-k", 4000, "-v", 20, "-w", 3, "--negative", 3, "--subsample", "1e-3", "-t", 1, "-i", 1]
LOCAL = ["--sampling.scheme", "local"]


def losses(result, code=0):
    """The loss of each iteration."""
    assert result.code == code, result.text
    found = [match for line in result.lines if (match := EPOCH.match(line))]
    assert [int(match[1]) for match in found] == list(range(1, len(found) + 1)) and found, result.text
    return np.array([float(match[2]) for match in found])


def vectors(path):
    """{word: vector} of a file in binary format."""
    head, _, rest = path.read_bytes().partition(b"\n")
    words, dim = map(int, head.split())
    found = {}
    for _ in range(words):
        word, _, rest = rest.partition(b" ")
        found[word] = np.frombuffer(rest[:4 * dim], dtype="<f4")
        rest = rest[4 * dim + 1:]
    assert not rest
    return found


# --- learning ---------------------------------------------------------------------------------------------------------------------

def test_the_command_of_the_readme(jobs, tmp_path):
    """The loss falls, little as there is to train on."""
    result = jobs.run(sys.executable, "tracker/dmlc_local.py", "-s", 2, sys.executable, PROGRAM, "--num_threads", 2, "--negative", 2,
                      "--binary", 1, "--num_keys", 4970, "--embed_dim", 10, "--input_file", "apps/data/lm/small.txt", "--num_iterations", 4,
                      "--window", 2, "--localize_pos", 1, "--data_words", 10000, "--report", tmp_path / "report")
    losses(result)
    rows = [json.loads(line) for line in (tmp_path / "report").read_text().splitlines()]
    found = [row["loss"] for row in rows]
    assert len(found) == 4 and found[-1] < 3 * np.log(2) and (np.diff(found) < 0).all(), found
    assert all(10_000 <= row["words"] < 20_000 for row in rows)
    assert "word2vec: OK (2 nodes x 2 workers, 4 epochs" in result.text


def test_nodes_and_threads_agree(jobs, tmp_path):
    """Each has draws of its own; the losses of an iteration are within 2 % of each other all the same, and so are what words are like."""
    found = {}
    options = [*QUICK, "-i", 3, "--starting_alpha", 0.1, "--write_results", 1, "--sampling.scheme", "preloc", "--prep_context_ahead", 100]
    for nodes, threads in ((1, 1), (1, 2), (2, 1)):
        out = tmp_path / f"{nodes}x{threads}"
        command = [PROGRAM, *options, "-t", threads, "-o", out]
        found[nodes, threads] = losses(jobs.launch(nodes, *command) if nodes > 1 else jobs.run(sys.executable, *command))
    alone = found[1, 1]
    assert (np.diff(alone) < 0).all() and alone[-1] < 0.95 * alone[0]
    for other in found.values():
        np.testing.assert_allclose(other, alone, rtol=0.02)

    def likeness(name):
        matrix = np.array(list(vectors(tmp_path / name).values()))[:300]
        matrix = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
        return (matrix @ matrix.T)[np.triu_indices(300, 1)]
    for name in "1x2", "2x1":
        assert np.corrcoef(likeness("1x1"), likeness(name))[0, 1] > 0.7


@pytest.mark.parametrize("options", [
    "", "-t 3", "--dtype float64", "--enforce_random_keys 1", "--shuffle 0", "--shared_memory 0", "--sync_push 0 -t 2",
    "--localize_pos 0", "--sys.location_caches 1 --localize_pos 0", "--peek_ahead 5", "--prep_context_ahead 0", "--negative 18",
    "--subsample 0", "--sampling.scheme preloc --prep_context_ahead 200", "--sampling.scheme local",
    "--sampling.with_replacement 0 --prep_context_ahead 100 --sampling.scheme preloc", "--neg_power 1000",
    "--sampling.scheme local -t 2 --negative 0", "--sampling.scheme pool --sampling.reuse 2 --prep_context_ahead 100"])
def test_every_way_learns(jobs, options, tmp_path):
    """Each word of the text is read once an iteration, by one of the workers."""
    whole = "scheme" in options         # the others pull their draws one by one
    options = [*options.split(), *([] if whole else ["--data_words", 5000])]
    found = losses(jobs.launch(2, PROGRAM, *QUICK, "-i", 2, "--starting_alpha", 0.1, *options, "--report", tmp_path / "report"))
    assert len(found) == 2 and found[1] < found[0]
    rows = [json.loads(line) for line in (tmp_path / "report").read_text().splitlines()]
    assert all(row["words"] == 100_000 if whole else 5_000 <= row["words"] < 10_000 for row in rows)
    assert all(0 <= row["local_share"] <= 1 and row["pairs"] > 0 for row in rows)


def test_the_seeds_say_what_is_random(jobs, tmp_path):
    def run(*options):
        losses(jobs.run(sys.executable, PROGRAM, *QUICK, "--write_results", 1, "-o", tmp_path / "v", *options))
        return (tmp_path / "v").read_bytes()
    once = run()
    assert run() == once
    assert run("--seed", 2) != once
    assert run("--model_seed", 2) != once


def test_the_start(jobs, tmp_path):
    """Random vectors do not depend on the number of workers; `none` leaves zeros."""
    def run(nodes, *options):
        result = jobs.launch(nodes, PROGRAM, *QUICK, "-i", 0, "--write_results", 1, "-o", tmp_path / "v", *options)
        assert result.code == 0, result.text
        return np.array(list(vectors(tmp_path / "v").values()))
    start = run(1)
    assert start.shape == (1988, 20) and 0.4 < abs(start).max() * 20 <= 0.5
    assert np.array_equal(run(2, "-t", 2), start)
    assert np.allclose(run(1, "--init_scale", 2), 4 * start)
    assert not run(1, "--init_model", "none").any()


# --- files ------------------------------------------------------------------------------------------------------------------------

def test_a_checkpoint_is_a_start(jobs, tmp_path):
    out = tmp_path / "new" / "vectors"
    result = jobs.launch(2, PROGRAM, *QUICK, *LOCAL, "-i", 3, "--starting_alpha", 0.1, "--checkpoint", tmp_path / "c", "--write_results", 1,
                         "-o", out, "--vocab_save", tmp_path / "vocabulary")
    first = losses(result)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["epoch-1", "epoch-2", "epoch-3"]
    found = vectors(out)
    inputs, outputs = (np.load(tmp_path / "c/epoch-3" / name) for name in ("input.npy", "output.npy"))
    assert np.array_equal(np.array(list(found.values())), inputs) and outputs.shape == inputs.shape and outputs.any()
    words = [line.split()[0] for line in (tmp_path / "vocabulary").read_bytes().splitlines()]
    assert words == list(found) and (tmp_path / "vocabulary").read_bytes() == (tmp_path / "c/epoch-3/vocabulary.txt").read_bytes()
    again = losses(jobs.launch(2, PROGRAM, *QUICK, *LOCAL, "--starting_alpha", 0.01, "--init_model", tmp_path / "c", "--vocab_retrieve",
                               tmp_path / "vocabulary"))
    assert again[0] < first[-1]
    text = tmp_path / "text"
    result = jobs.run(sys.executable, PROGRAM, *QUICK, "-i", 0, "--init_model", tmp_path / "c/epoch-3", "--write_results", 1, "-o", text,
                      "--binary", 0)
    assert result.code == 0, result.text
    lines = text.read_bytes().splitlines()
    assert lines[0] == b"1988 20" and [line.split()[0] for line in lines[1:]] == words
    assert np.array_equal(np.array([line.split()[1:] for line in lines[1:]], dtype=np.float32), inputs)


def test_a_file_per_node(jobs, tmp_path):
    lines = SMALL.read_bytes().splitlines(keepends=True)
    for rank in 0, 1:
        (tmp_path / f"text.{rank}").write_bytes(b"".join(lines[rank::2]))
    result = jobs.launch(2, PROGRAM, *QUICK, *LOCAL, "-f", tmp_path / "text", "--clustered_input", 1, "--vocab_save", tmp_path / "v")
    losses(result)
    assert "of 100000 words left by subsampling" in result.text
    assert len((tmp_path / "v").read_bytes().splitlines()) == 1988


def test_max_runtime_ends_cleanly_and_writes_the_vectors(jobs, tmp_path):
    result = jobs.launch(2, PROGRAM, *QUICK, "-i", 1_000_000, "--max_runtime", 1.5, "--write_results", 1, "-o", tmp_path / "v")
    assert result.code == 0 and "word2vec: stopped by --max_runtime" in result.text, result.text
    assert np.isfinite(np.array(list(vectors(tmp_path / "v").values()))).all()


def test_debug_mode(jobs):
    assert "epoch 1" in jobs.run(sys.executable, PROGRAM, *QUICK, "-d", 1).text
    assert "epoch 1" not in jobs.run(sys.executable, PROGRAM, *QUICK, "-d", 0).text


# --- bad input ----------------------------------------------------------------------------------------------------------------------

def spoil(folder, case):
    """Make one thing wrong; return options, and what has to be said."""
    text = folder / "text"
    text.write_text("a a a a a b b b b b\n")
    options = {"-f": text, "-k": 4, "-v": 3, "-i": 1, "-t": 1}
    if case == "no file":
        options["-f"], what = folder / "none", "none: No such file"
    elif case == "folder":
        options["-f"], what = folder, "is not a regular file"
    elif case == "empty":
        text.write_text("")
        what = "text has no words"
    elif case == "rare words":
        options["--min_count"], what = 6, "no word of .*text occurs 6 times"
    elif case == "keys":
        options["-k"], what = 3, "--num_keys is 3, but a vocabulary of 2 words needs 4"
    elif case == "no file per node":
        options["--clustered_input"], what = 1, "text.0: No such file"
    elif case == "vocabulary":
        (folder / "v").write_text("a 5\nb five\n")
        options["--vocab_retrieve"], what = folder / "v", "v:2: the line is not a word"
    elif case == "counts":
        (folder / "v").write_text(f"a {2**61}\nb {2**61}\n")
        options["--vocab_retrieve"], what = folder / "v", "v:2: the words occur 4611686018427387904 times or more"
    elif case == "few words":
        options["--sampling.with_replacement"], options["--negative"], options["-w"] = 0, 1, 2
        what = "up to 2 x 2 x 1 .*, but the vocabulary has 2"
    elif case == "pipe":
        os.mkfifo(folder / "p")
        options["-f"], what = folder / "p", "p is not a regular file"
    elif case == "output pipe":
        os.mkfifo(folder / "p")
        options["--write_results"], options["-o"], what = 1, folder / "p", "--output_file .*p: is not a regular file"
    elif case == "report":
        options["--report"], what = folder, "--report .*: Is a directory"
    elif case == "report pipe":
        os.mkfifo(folder / "p")
        options["--report"], what = folder / "p", "--report .*p: No such device or address"
    elif case == "keys of no machine":
        options["-k"], what = 2**40, "out of memory"
    elif case == "empty checkpoint":
        (folder / "c").mkdir()
        (folder / "c/vocabulary.txt").write_text("a 5\nb 5\n")
        (folder / "c/input.npy").write_text("")
        options["--init_model"], what = folder / "c", "input.npy is not a whole .npy file"
    elif case == "no vocabulary":
        options["--vocab_retrieve"], what = folder / "v", "v: No such file"
    elif case == "output":
        options["--write_results"], options["-o"], what = 1, text / "vectors", "--output_file .*text: (File exists|Not a directory)"
    elif case == "checkpoint folder":
        options["--checkpoint"], what = text, "--checkpoint .*text: File exists"
    elif case == "no checkpoint":
        options["--init_model"], what = folder / "c", "there is no such folder"
    elif case in ("dimension", "words"):
        (folder / "c").mkdir()
        (folder / "c/vocabulary.txt").write_text("a 5\nb 5\n" if case == "dimension" else "a 5\nc 5\n")
        for name in "input.npy", "output.npy":
            np.save(folder / "c" / name, np.zeros((2, 4)))
        options["--init_model"] = folder / "c"
        what = "vectors of 4 numbers, but --embed_dim is 3" if case == "dimension" else "vocabulary.txt:2: the word is c, but b"
    return [word for pair in options.items() for word in pair], what


CASES = ["no file", "folder", "empty", "rare words", "keys", "no file per node", "vocabulary", "no vocabulary", "output",
         "checkpoint folder", "no checkpoint", "dimension", "words", "counts", "few words", "pipe", "output pipe", "report", "report pipe",
         "keys of no machine", "empty checkpoint"]


@pytest.mark.parametrize(("case", "nodes"), [*[(case, 0) for case in CASES], ("keys", 2), ("no file per node", 2), ("empty", 2)])
def test_bad_input_is_one_sentence(jobs, tmp_path, case, nodes):
    options, what = spoil(tmp_path, case)
    before = sorted(tmp_path.rglob("*"))
    result = jobs.launch(nodes, PROGRAM, *options) if nodes else jobs.run(sys.executable, PROGRAM, *options)
    assert result.code == 2, result.text
    assert re.search(what, result.text) and "Traceback" not in result.text, result.text
    said = [line for line in result.lines if line.startswith("word2vec: ")]
    assert 1 <= len(said) <= max(nodes, 1)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("options", "what"), [
    ("-v 0", "too small"), ("-w 0", "too small"), ("--negative -1", "too small"), ("--starting_alpha 0", "not above 0"),
    ("--subsample -1", "not above 0"), ("--data_words many", "not a whole number"), ("--binary 2", "invalid choice"),
    ("--replicate 5", "reserved"), ("--downsample_replicated_negatives 1", "reserved"), ("--dtype int32", "invalid choice"),
    ("--negative 3000000000", "too large"), ("-w 70000", "too large"), ("-v 99999999999", "too large"),
    ("-k 9223372036854775807", "too large"), ("--data_words 99999999999999999999", "too large"),
    ("--seed 18446744073709551616", "too large"), ("--starting_alpha nan", "not above 0"),
    ("--prep_context_ahead 9999999999", "too large"), ("-t 0", "too small"),
    ("--sampling.scheme some", "no sampling scheme"), ("--shuffle maybe", "truth value"), ("--max_runtime 0", "not above 0")])
def test_a_wrong_option_is_refused(jobs, options, what):
    result = jobs.run(sys.executable, PROGRAM, *QUICK, *options.split())
    assert result.code == 2 and what in result.text and "Traceback" not in result.text, result.text


def test_needed_options(jobs):
    result = jobs.run(sys.executable, PROGRAM)
    assert result.code == 2 and "--input_file" in result.text
    assert jobs.run(sys.executable, PROGRAM, "--help").code == 0


def test_vectors_that_diverge_end_the_job(jobs, tmp_path):
    result = jobs.launch(2, PROGRAM, *QUICK, "-i", 30, "--starting_alpha", "1e30", "--write_results", 1, "-o", tmp_path / "out/v")
    assert result.code == 1 and "the vectors have diverged in epoch" in result.text and "Traceback" not in result.text, result.text
    assert not list((tmp_path / "out").iterdir())


LIMITED = f"import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, {resource.RLIM_INFINITY})); " \
          "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"


@pytest.mark.parametrize(("options", "what"), [(["--write_results", 1, "-o", "v"], "v: File too large"),
                                               (["--checkpoint", "."], "out/epoch-1: File too large")])
def test_a_disk_that_fills_up_leaves_nothing_half_written(jobs, tmp_path, options, what):
    """A limit of the size of files stands for the disk."""
    options = [tmp_path / "out" / option if option in ("v", ".") else option for option in options]
    result = jobs.run(sys.executable, "-c", LIMITED, PROGRAM, *QUICK, *options)
    assert result.code == 1 and what in result.text and "Traceback" not in result.text, result.text
    assert not list((tmp_path / "out").iterdir())
