"""The table of configurations: which programs run on how many nodes with which options, and what they have to print.

Each run is a job of real processes under the launcher. It has a deadline, at which the stacks of its processes are printed, and a test
fails when a job leaves a process or a file in the folder for temporary files behind.
"""
import re
import shlex
import sys
from pathlib import Path

import pytest
from launched import PROC, ROOT, Jobs


@pytest.mark.skipif(not PROC.is_dir(), reason="processes are found in /proc")
def test_what_a_job_leaves_behind_is_seen():
    jobs = Jobs()
    script = ("import pathlib, subprocess, sys, tempfile; pathlib.Path(tempfile.gettempdir(), 'left.sock').touch(); "
              "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)")
    assert jobs.run(sys.executable, "-c", script).code == 0
    processes, files = jobs.close()
    assert [line for line in processes.values() if "time.sleep(600)" in line] and len(processes) == 1
    assert [Path(file).name for file in files] == ["left.sock"]
    assert not jobs.settle()        # it has been ended


@pytest.mark.skipif(not PROC.is_dir(), reason="processes are found in /proc")
def test_a_job_that_hangs_is_ended_and_shows_its_stacks(jobs):
    script = "import time\ndef hang():\n    print('started', flush=True)\n    time.sleep(600)\nhang()"
    with pytest.raises(pytest.fail.Exception, match=r"did not end in 3 s:\nstarted\n(.*\n)*.*in hang"):
        jobs.run(sys.executable, "-c", script, deadline=3)


# --- the test programs --------------------------------------------------------------------------------------------------------

PROGRAMS = ["test_connection", "test_consistency", "test_dynamic_allocation", "test_locality_api", "test_many_key_operations",
            "test_sampling", "test_set_operation", "test_variable_length_values"]
WORKERS = {"test_many_key_operations": 4}       # per node; the others have 2

CONFIGURATIONS = [(program, nodes, f"--sys.location_caches {caches}")
                  for program in PROGRAMS for nodes in (1, 2, 3, 4) for caches in (0, 1)]
CONFIGURATIONS += [(program, nodes, f"--shared_memory off --sys.location_caches {caches}")
                   for program in PROGRAMS for nodes, caches in ((1, 0), (3, 1))]
CONFIGURATIONS += [
    ("test_connection", 3, "--sys.transport tcp"),
    ("test_connection", 3, "--sys.transport ipc --sys.zmq_threads 2"),
    ("test_connection", 4, "-t 1"),
    ("test_consistency", 2, "--face python"),
    ("test_consistency", 3, "--face python --sys.location_caches 1"),
    ("test_consistency", 3, "--face python --shared_memory 0"),
    ("test_consistency", 4, "-k 1 --sys.location_caches 1"),
    ("test_consistency", 2, "-k 16 -t 4 --window 200 --batch 3"),
    ("test_consistency", 3, "--window 1"),
    ("test_consistency", 2, "--sys.transport tcp --sys.location_caches 1"),
    ("test_consistency", 3, "--workload race --batch 1"),
    ("test_consistency", 4, "--workload race --sys.location_caches 1"),
    ("test_dynamic_allocation", 2, "--window 0"),
    ("test_dynamic_allocation", 3, "--localize_every 3 --dtype int64"),
    ("test_many_key_operations", 2, "--sys.transport tcp --dtype float64"),
    ("test_many_key_operations", 3, "-k 2 -i 20"),
    ("test_locality_api", 4, "-k 3"),
    ("test_set_operation", 2, "--dtype int32"),
    ("test_set_operation", 4, "-k 3 --dtype int64"),
    ("test_sampling", 3, "-t 4 -i 8"),
    ("test_sampling", 2, "-t 4 --sampling.with_replacement 0"),
    ("test_sampling", 3, "--schemes pool --sampling.reuse 7 --sampling.group_size 11 --sampling.postpone 0"),
    ("test_sampling", 2, "--schemes pool,preloc --sys.transport tcp --dtype float64"),
    ("test_sampling", 2, "-k 12 -t 3 --seed 5"),
    ("test_variable_length_values", 2, "--dtype float64 --longest 1000 -k 40"),
    ("test_variable_length_values", 3, "--stored_extra 3"),
]


def check_program(result, program, nodes, workers):
    assert result.code == 0, result.text
    assert "WRONG" not in result.text
    closing = result.closing(program)
    assert sorted(closing) == list(range(nodes)), result.text
    for word, numbers in closing.values():
        match = re.fullmatch(r"(\d+) nodes x (\d+) workers, (\d+) checks, 0 wrong", numbers)
        assert word == "OK" and match, result.text
        assert (int(match[1]), int(match[2])) == (nodes, workers)
        assert int(match[3]) >= workers
    equal = re.compile(r"node \d+ worker \d+: .* (-?\d+) = expected (-?\d+)")
    numbers = [match for line in result.lines if (match := equal.fullmatch(line))]
    assert len(numbers) >= nodes * workers, result.text
    assert all(match[1] == match[2] for match in numbers)


@pytest.mark.parametrize(("program", "nodes", "options"), CONFIGURATIONS,
                         ids=[f"{program}-{nodes}-{options.replace(' ', '_')}" for program, nodes, options in CONFIGURATIONS])
def test_program(jobs, program, nodes, options):
    result = jobs.launch(nodes, f"tests/cluster/{program}.py", "--quick", *options.split())
    threads = re.search(r"-t (\d+)", options)
    check_program(result, program, nodes, int(threads[1]) if threads else WORKERS.get(program, 2))
    assert result.prefixes == {(node, node) for node in range(nodes)}


def test_the_table_has_every_program():
    assert sorted(path.stem for path in (ROOT / "tests/cluster").glob("test_*.py")) == PROGRAMS


@pytest.mark.parametrize("program", PROGRAMS)
def test_program_without_the_launcher(jobs, program):
    result = jobs.run(sys.executable, f"tests/cluster/{program}.py", "--quick")
    check_program(result, program, 1, WORKERS.get(program, 2))
    assert not result.prefixes


@pytest.mark.parametrize("program", PROGRAMS)
def test_options_of_a_program(jobs, program):
    path = f"tests/cluster/{program}.py"
    result = jobs.run(sys.executable, path, "--help")
    assert result.code == 0
    assert "--quick" in result.text and "--sys.location_caches" in result.text
    for words in (["--nothing"], ["-t", "0"], ["--sys.transport", "pigeon"]):
        result = jobs.run(sys.executable, path, *words)
        assert result.code == 2
        assert result.text.startswith(f"usage: {program}")


@pytest.mark.parametrize("start", range(5))
def test_jobs_one_after_the_other(jobs, start):
    check_program(jobs.launch(4, "tests/cluster/test_connection.py", "-i", "1"), "test_connection", 4, 2)


def test_the_reads_of_a_consistency_run_are_kept_on_request(jobs, tmp_path):
    result = jobs.launch(2, "tests/cluster/test_consistency.py", "--quick", "--out", tmp_path / "reads")
    check_program(result, "test_consistency", 2, 2)
    assert sorted(path.name for path in (tmp_path / "reads").iterdir()) == [f"worker-{worker}.npz" for worker in range(4)]
    job = re.search(r"job: (\d+) reads checked, (\d+) different ones compared, (\d+) pushes", result.text)
    assert job and int(job[1]) >= 40_000 and int(job[2]) > 0 and int(job[3]) > 0


@pytest.mark.slow
@pytest.mark.parametrize(("nodes", "options"), [(2, ""), (4, "--sys.location_caches 1"), (3, "--shared_memory 0")])
def test_a_longer_history(jobs, nodes, options):
    result = jobs.launch(nodes, "tests/cluster/test_consistency.py", "--pulls", 1_000_000, *options.split(), deadline=600)
    check_program(result, "test_consistency", nodes, 2)


@pytest.mark.slow
def test_the_race_finds_the_bug_of_the_original(jobs):
    for seed in range(10):      # each the same configuration: 3 nodes, one key a call; nearly always the first job shows it
        result = jobs.run(sys.executable, "tests/soak.py", "--fault", "split_route", "--job", 2e6, "--pulls", 1, "--seed", 2 + 48 * seed)
        found = re.search(r"^soak: .* (\d+) violations, 0 jobs that did not end well", result.text, re.MULTILINE)
        assert found and result.code == (1 if int(found[1]) else 0), result.text
        if int(found[1]):
            return
    pytest.fail("20,000,000 pulls with the bug of the original have shown no violation")


# --- the first application ----------------------------------------------------------------------------------------------------

def check_simple(result, nodes, threads=2, keys=10, iterations=4, values=3):
    """Check every line that `simple` prints on so many nodes."""
    assert result.code == 0, result.text
    workers = nodes * threads
    expected = []
    for node in range(nodes):
        for worker in range(threads):
            for key in range(keys):
                total = sum(key + iterations * (workers * (workers + 1) // 2 + workers * c) for c in range(values))
                expected.append(f"node {node} worker {worker} key {key}: sum {total}.0 = expected {total}.0")
        expected.append(f"node {node} simple: OK ({nodes} nodes x {threads} workers, {keys} keys, {values} values per key, "
                        f"{iterations} iterations)")
    printed = [line for line in result.lines if re.match(r"node \d+ (worker \d+|simple)", line)]
    assert sorted(printed) == sorted(expected), result.text


def command(text):
    """Return the words of a command line of the README, with this Python."""
    words = shlex.split(text)
    return [sys.executable if word == "python" else word for word in words]


@pytest.fixture
def built(jobs):
    result = jobs.run(*command("make apps/simple"), deadline=600)
    assert result.code == 0, result.text


@pytest.mark.usefixtures("built")
def test_simple_on_one_node_under_the_launcher(jobs):
    result = jobs.run(*command("python tracker/dmlc_local.py -s 1 build/apps/simple"))
    check_simple(result, 1)
    assert "[node 0] node 0 worker 1 key 3: sum 69.0 = expected 69.0" in result.text.splitlines()


@pytest.mark.usefixtures("built")
def test_simple_on_three_nodes(jobs):
    result = jobs.run(*command("python tracker/dmlc_local.py -s 3 build/apps/simple -v 5 -i 10 -k 14 -t 4"))
    check_simple(result, 3, threads=4, keys=14, iterations=10, values=5)
    assert "[node 2] node 2 worker 3 key 13: sum 5165.0 = expected 5165.0" in result.text.splitlines()


@pytest.mark.usefixtures("built")
def test_help_of_simple(jobs):
    result = jobs.run(*command("build/apps/simple --help"))
    assert result.code == 0
    for name in ("--num_keys", "--num_threads", "--num_iterations", "--num_values_per_key", "-k", "-t", "-i", "-v",
                 "--sys.location_caches", "--sys.nw_threads", "--sampling.scheme"):
        assert name in result.text


@pytest.mark.slow
def test_dynamic_allocation_as_it_is_called_in_the_readme(jobs):
    result = jobs.run(*command("make -j 4 tests/test_dynamic_allocation"), deadline=600)
    assert result.code == 0, result.text
    result = jobs.run(*command("python tracker/dmlc_local.py -s 4 build/tests/test_dynamic_allocation"), deadline=600)
    check_program(result, "test_dynamic_allocation", 4, 2)
    assert "node 3 worker 1: total 800000 = expected 800000" in result.lines


def test_simple_without_the_launcher(jobs):
    check_simple(jobs.run(sys.executable, "apps/simple.py"), 1)


@pytest.mark.parametrize(("nodes", "options"), [
    (2, {"keys": 1}), (4, {"keys": 3, "values": 1}), (3, {"iterations": 0}), (2, {"threads": 1}),
    (2, {"keys": 30, "extra": "--sys.location_caches 1"}), (3, {"extra": "--shared_memory off"}),
    (2, {"extra": "--sys.transport tcp"})])
def test_simple_with_other_options(jobs, nodes, options):
    extra = options.pop("extra", "").split()
    words = [f"--num_{'values_per_key' if name == 'values' else name}={number}" for name, number in options.items()]
    check_simple(jobs.launch(nodes, "apps/simple.py", *words, *extra), nodes, **options)


@pytest.mark.parametrize("words", ["-k 0", "-t 0", "-v 0", "-i -1", "-k -3", "-k x", "--nothing", "5", "--sys.transport x"])
def test_wrong_options_of_simple(jobs, words):
    result = jobs.run(sys.executable, "apps/simple.py", *words.split())
    assert result.code == 2
    assert result.text.startswith("usage: simple") and "simple: error:" in result.text


def test_the_launcher_ends_with_the_code_of_a_wrong_option(jobs):
    result = jobs.launch(2, "apps/simple.py", "-k", "0")
    assert result.code == 2
    assert "usage: simple" in result.text


@pytest.mark.parametrize("option", ["--rep.sync 1", "--sys.techniques all", "--sys.channels=2", "--replicate 1"])
def test_options_of_later_versions(jobs, option):
    result = jobs.run(sys.executable, "apps/simple.py", *option.split())
    assert result.code == 2
    assert ("replication and intent" in result.text) != (option == "--replicate 1")     # simple never had that one
