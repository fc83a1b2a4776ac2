"""The knowledge-graph embeddings as a job: what they learn on one and several nodes, their options, and what they say of bad input."""
import json
import re
import resource
import shutil
import sys

import numpy as np
import pytest
from launched import ROOT

pytest.importorskip("apps.kge._kernel", reason="the kernels are not built: make kernels")

PROGRAM = "apps/knowledge_graph_embeddings.py"
TOY = ROOT / "apps/data/kge"
SIZE = ["--num_entities", 280, "--num_relations", 112]
ALONE = ["--read_partitioned_dataset", 0, "-t", 1]
MRR = re.compile(r"epoch (\d+): (train|valid|test): MRR (\S+) MR (\S+) hits@1/3/10 (\S+) (\S+) (\S+); raw MRR (\S+)")
LOSS = re.compile(r"epoch (\d+): .* loss ([^ ,]+), (\S+) % local")


@pytest.fixture
def data(tmp_path):
    shutil.copytree(TOY, tmp_path / "kge")
    return tmp_path / "kge"


def ranks(result, split="test", code=0):
    """Return {epoch: (MRR, raw MRR)}."""
    assert result.code == code, result.text
    return {int(match[1]): (float(match[3]), float(match[8])) for line in result.lines if (match := MRR.match(line)) and match[2] == split}


def losses(result):
    assert result.code == 0, result.text
    return [float(match[2]) for line in result.lines if (match := LOSS.match(line))]


# --- learning ---------------------------------------------------------------------------------------------------------------------

def test_the_command_of_the_toy_data(jobs):
    result = jobs.run(sys.executable, "tracker/dmlc_local.py", "-s", 2, sys.executable, PROGRAM, "--dataset", "apps/data/kge/",
                      *SIZE, "--num_epochs", 4, "--embed_dim", 100, "--eval_freq", 2, "--eval_initial", 1)
    found = ranks(result)
    assert sorted(found) == [0, 2, 4] and found[0][0] < 0.05 and found[4][0] > 0.6 and found[4][1] < found[4][0]
    for split in "train", "valid":
        assert ranks(result, split)[4][0] > 0.6
    assert "knowledge_graph_embeddings: OK (2 nodes x 2 workers, 4 epochs" in result.text


def test_permuted_objects_teach_nothing(jobs, data):
    rows = np.loadtxt(data / "train.del", dtype=int)
    rows[:, 2] = np.random.default_rng(1).permutation(rows[:, 2])
    command = [sys.executable, PROGRAM, "--dataset", data, *SIZE, *ALONE, "--embed_dim", 100, "--num_epochs", 10, "--eval_freq", 10]
    assert ranks(jobs.run(*command))[10][0] >= 0.5
    np.savetxt(data / "train.del", rows, fmt="%d", delimiter="\t")
    assert ranks(jobs.run(*command))[10][0] < 0.1


@pytest.mark.parametrize(("nodes", "options"), [
    (4, "-t 1"), (2, "--algorithm RESCAL"), (2, "--dtype float64 --shared_memory 0"), (2, "--enforce_random_keys 1 --location_caches 1"),
    (2, "--localize_parameters_ahead 10 --sampling.scheme preloc --async_push 1"),
    (2, "--localize_relations_initial 1 --localize_parameters_ahead 5 --sampling.scheme preloc --async_push 1"),
    (2, "--sampling.scheme local --localize_parameters_ahead 5 --async_push 1"), (2, "--sampling.scheme pool --async_push 1"),
    (2, "--algorithm RESCAL --relation_parts 4 --enforce_random_keys 1 --localize_parameters_ahead 3"),
    (2, "--read_partitioned_dataset 0 --group 3 --sys.location_caches 1"), (2, "--sampling.with_replacement 0"),
    (1, "-t 3 --read_partitioned_dataset 0"), (1, "-t 1 --read_partitioned_dataset 0 --neg_ratio 20 --group 20")])
def test_every_way_learns_the_same(jobs, nodes, options):
    result = jobs.launch(nodes, PROGRAM, "--dataset", TOY, *SIZE, "--embed_dim", 20, "--num_epochs", 5, "--eval_freq", 5, *options.split())
    # RESCAL has more parameters than the toy data can tell
    assert ranks(result)[5][0] > 0.5 and losses(result)[-1] < 0.25


def test_localizing_makes_parameters_local(jobs, data):
    def share(*options):
        result = jobs.launch(2, PROGRAM, "--dataset", data, *SIZE, "--embed_dim", 20, "--num_epochs", 2, "--eval_freq", -1, *options)
        assert result.code == 0, result.text
        return [float(match[3]) for line in result.lines if (match := LOSS.match(line))][-1]
    few = share()
    more = share("--localize_parameters_ahead", 10, "--async_push", 1, "--sampling.scheme", "preloc")
    assert few < 75 and more > few + 5


def test_the_start_does_not_depend_on_the_partition(jobs, tmp_path):
    found = []
    for nodes, options in ((1, ALONE), (2, ["-t", 2]), (2, ["-t", 2, "--enforce_random_keys", 1])):
        folder = tmp_path / f"out{len(found)}"
        result = jobs.launch(nodes, PROGRAM, "--dataset", TOY, *SIZE, "--num_epochs", 0, "--write_embeddings", folder,
                             "--write_end_checkpoint", 1, "--eval_freq", -1, *options)
        assert result.code == 0, result.text
        found.append([np.load(folder / f"epoch-0/{name}.npy") for name in ("entities", "relations", "entity_sums", "relation_sums")])
    for other in found[1:]:
        assert all((one == same).all() for one, same in zip(found[0], other))
    assert 0.06 < abs(found[0][0]).max() <= 0.07 and (found[0][2] == np.float32(1e-6)).all()


@pytest.mark.parametrize("algorithm", ["ComplEx", "RESCAL"])
def test_going_on_equals_going_through(jobs, tmp_path, algorithm):
    command = [sys.executable, PROGRAM, "--dataset", TOY, *SIZE, *ALONE, "--embed_dim", 10, "--algorithm", algorithm, "--eval_freq", 2]
    through = jobs.run(*command, "--num_epochs", 4, "--write_embeddings", tmp_path / "a", "--write_every", 2)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["epoch-2", "epoch-4"]
    on = jobs.run(*command, "--num_epochs", 4, "--write_embeddings", tmp_path / "b", "--write_every", 9, "--write_end_checkpoint", 1,
                  "--init_model", tmp_path / "a/epoch-2")
    assert ranks(on) == {4: ranks(through)[4]} and losses(on) == losses(through)[2:]
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["epoch-4"]
    for path in (tmp_path / "a/epoch-4").iterdir():
        assert path.read_bytes() == (tmp_path / "b/epoch-4" / path.name).read_bytes()
    # the same model on other nodes, and in another number type
    again = jobs.launch(2, PROGRAM, "--dataset", TOY, *SIZE, "--embed_dim", 10, "--algorithm", algorithm, "--eval_initial", 1,
                        "--num_epochs", 0, "--init_model", tmp_path / "a/epoch-4", "--dtype", "float64")
    assert ranks(again)[4] == pytest.approx(ranks(through)[4], abs=2e-3)


def test_seeds_and_report(jobs, tmp_path):
    def run(*options):
        result = jobs.run(sys.executable, PROGRAM, "--dataset", TOY, *SIZE, *ALONE, "--num_epochs", 1, "--eval_freq", -1, *options)
        return losses(result)
    once = run("--report", tmp_path / "report")
    assert run() == once and run("--seed", 2) != once and run("--model_seed", 2) != once
    row = json.loads((tmp_path / "report").read_text())
    assert row["epoch"] == 1 and row["triples"] == 4512 and row["loss"] == pytest.approx(once[0], rel=1e-4) and row["metrics"] == {}


def test_limits_of_a_run(jobs, data):
    result = jobs.launch(2, PROGRAM, "--dataset", data, *SIZE, "--num_epochs", 2, "--max_N", 100, "--eval_truncate_tr", 50,
                         "--eval_truncate_va", 50, "--report", data / "report", "--eval_freq", 2)
    assert result.code == 0, result.text
    rows = [json.loads(line) for line in (data / "report").read_text().splitlines()]
    assert [row["triples"] for row in rows] == [400, 400] and list(rows[1]["metrics"]) == ["train", "valid", "test"]
    result = jobs.launch(2, PROGRAM, "--dataset", data, *SIZE, "--num_epochs", 1000000, "--max_runtime", 1, "--eval_freq", -1)
    assert result.code == 0 and "knowledge_graph_embeddings: stopped by --max_runtime" in result.text and "MRR" not in result.text
    (data / "valid.del").unlink()
    result = jobs.run(sys.executable, PROGRAM, "--dataset", data, *SIZE, *ALONE, "--num_epochs", 1, "--init_parameters", 0,
                      "--eval_initial", 1)
    found = ranks(result)           # all vectors are zero: the true entity is in the middle of those that are not filtered out
    assert found[0][1] == pytest.approx(2 / 281, abs=1e-4) and found[0][0] == pytest.approx(found[1][0]) and not ranks(result, "valid")


# --- bad input ----------------------------------------------------------------------------------------------------------------------

def spoil(data, case):
    """Make one thing wrong; return options, and what has to be said."""
    options = {"--dataset": data, "--num_entities": 280, "--num_relations": 112, "--num_epochs": 1}
    part = data / "train.partitioned.2x2.del"
    if case == "no folder":
        options["--dataset"], what = data / "none", "none: no such folder"
    elif case == "not partitioned":
        part.unlink()
        what = r"train.partitioned.2x2.del is missing: make it by `python -m lapse partition .* 2 2`"
    elif case == "malformed":
        part.write_text(part.read_text().replace("\n", "\nx\t1\t2\t0\n", 1))
        what = "2x2.del:2: the line is not 4 whole numbers"
    elif case == "entity":
        options["--num_entities"], what = 200, r"2x2.del:\d+: the line has entity \d+, but --num_entities is 200"
    elif case == "relation":
        options["--num_relations"], what = 100, r"2x2.del:\d+: the line has relation \d+, but --num_relations is 100"
    elif case == "empty":
        part.write_text("")
        what = "2x2.del has no triples"
    elif case == "test":
        (data / "test.del").write_text("1\t2\t280\n")
        what = "test.del:1: the line has entity 280"
    elif case == "no checkpoint":
        options["--init_model"], what = data, "no checkpoint, checkpoint.json: No such file"
    elif case == "folder":
        (data / "file").write_text("")
        options["--write_embeddings"], what = data / "file", "--write_embeddings .*file: File exists"
    elif case == "report":
        options["--report"], what = data, "--report .*: Is a directory"
    return [word for pair in options.items() for word in pair], what


CASES = ["report", "no folder", "not partitioned", "malformed", "entity", "relation", "empty", "test", "no checkpoint", "folder"]


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_sentence(jobs, data, case):
    options, what = spoil(data, case)
    result = jobs.launch(2, PROGRAM, *options)
    assert result.code == 2, result.text
    assert re.search(what, result.text) and "Traceback" not in result.text, result.text
    said = [line for line in result.lines if line.startswith("knowledge_graph_embeddings: ")]
    assert 1 <= len(said) <= 2


@pytest.mark.parametrize(("options", "what"), [
    ("--eta 0", "not above 0"), ("--eta -1", "not above 0"), ("--embed_dim 0", "too small"), ("--embed_dim 7", "has to be even"),
    ("--algorithm TransE", "is no algorithm"), ("--eval_freq 0", "too small"), ("--gamma_entity -1", "not above 0"),
    ("--replicate 5", "reserved"), ("--dtype int32", "invalid choice"), ("--sampling.scheme best", "no sampling scheme"),
    ("--dataset=", "--dataset is needed"), ("--write_end_checkpoint 1", "needs the folder"),
    ("--max_N 0", "too small"), ("--num_entities 0", "too small"), ("-t 0", "too small"), ("--eta nan", "not above 0"),
    ("--embed_dim 10000000000", "too large"), ("--neg_ratio 3000000000", "too large"), ("--num_entities 3000000000", "too large"),
    ("--localize_parameters_ahead 2147483647", "too large"), ("--seed 18446744073709551616", "too large"),
    ("--max_N 99999999999999999999", "too large"), ("--sampling.group_size 99999999", "too large"),
    ("--sampling.with_replacement 0 --neg_ratio 141", "2 x 141 (--neg_ratio), but --num_entities is 280")])
def test_a_wrong_option_is_refused(jobs, options, what):
    result = jobs.run(sys.executable, PROGRAM, "--dataset", TOY, *SIZE, *ALONE, "--num_epochs", 1, *options.split())
    assert result.code == 2 and what in result.text and "Traceback" not in result.text, result.text


def test_a_checkpoint_of_another_model(jobs, tmp_path):
    command = [sys.executable, PROGRAM, "--dataset", TOY, *ALONE, "--num_epochs", 1, "--eval_freq", -1]
    assert jobs.run(*command, *SIZE, "--write_embeddings", tmp_path).code == 0
    for options, what in (("--algorithm RESCAL", "its algorithm is ComplEx, but here it is RESCAL"),
                          ("--embed_dim 12", "its embed_dim is 10"), ("--num_entities 281", "its num_entities is 280, but here it is 281")):
        result = jobs.run(*command, *SIZE, "--init_model", tmp_path / "epoch-1", *options.split())
        assert result.code == 2 and what in result.text and "Traceback" not in result.text, result.text


def test_embeddings_that_diverge_end_the_job(jobs, tmp_path):
    result = jobs.launch(2, PROGRAM, "--dataset", TOY, *SIZE, "--eta", 1e20, "--num_epochs", 50, "--write_embeddings", tmp_path / "out")
    assert result.code == 1 and "the embeddings have diverged in epoch" in result.text and "Traceback" not in result.text, result.text


def test_a_full_disk_of_one_node_ends_the_others(jobs, tmp_path):
    """A limit of the size of files stands for the disk."""
    script = ("import os, resource, sys\n"
              "if os.environ.get('LAPSE_RANK') == '0':\n"
              f"    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, {resource.RLIM_INFINITY}))\n"
              "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])\n")
    result = jobs.launch(2, "-c", script, PROGRAM, "--dataset", TOY, *SIZE, "--embed_dim", 100, "--num_epochs", 2, "--write_embeddings",
                         tmp_path / "out", "--eval_freq", -1)
    assert result.code == 1 and re.search("out/epoch-1.*: File too large", result.text) and "Traceback" not in result.text, result.text
    assert not list((tmp_path / "out").iterdir())


def test_without_its_kernel_the_program_fails(jobs):
    argv = [PROGRAM, "--dataset", str(TOY), "--num_epochs", "1"]
    hide = f"import sys, runpy; sys.modules['apps.kge._kernel'] = None; sys.argv = {argv}; " \
           f"runpy.run_path({PROGRAM!r}, run_name='__main__')"
    assert jobs.run(sys.executable, "-c", hide).code != 0
