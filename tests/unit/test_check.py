"""tools/check.py, with a Makefile of its own: all stages run, what fails is shown and named, nothing runs on when it is stopped."""
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 60       # seconds
MAKEFILE = """
good: ; @echo good words; echo all of it
bad: ; @echo first words of bad; echo last words of bad; exit 3
one two: ; @touch $@; while [ ! -e one ] || [ ! -e two ]; do sleep 0.05; done; echo both are there
slow: ; @echo words of slow; echo $$$$ >pid; exec sleep 600
endless: ; @echo words of endless; echo $$$$ >pid; exec sleep 600
busy: ; @$(PYTHON) -c "import time; [None for _ in iter(lambda: time.process_time() < 1.5, False)]"
"""


@pytest.fixture
def check(tmp_path):
    """check(stage...) starts tools/check.py in a tree that has nothing but it and MAKEFILE."""
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools/check.py", tmp_path / "tools")
    (tmp_path / "Makefile").write_text(MAKEFILE)
    started = []

    def start(*words):
        started.append(subprocess.Popen([sys.executable, tmp_path / "tools/check.py", *map(str, words)], stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, text=True))
        return started[-1]

    yield start
    for process in started:
        process.terminate()         # it ends its stages
        try:
            process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()


def end(process):
    """(exit code, lines)"""
    output, _ = process.communicate(timeout=PATIENCE)
    return process.returncode, output.splitlines()


def test_all_is_well(check):
    code, lines = end(check("good", "busy"))
    assert code == 0, lines
    assert lines[:1] == ["check: good begins"] and not [line for line in lines if "good words" in line]
    rows = {line.split()[0]: line.split()[1:] for line in lines[lines.index(next(line for line in lines if line.startswith("stage"))):]}
    assert set(rows) == {"stage", "good", "busy", "all"} and int(rows["busy"][1]) >= 1     # what a stage's own processes have used


def test_what_fails_is_shown_and_the_others_run(check, tmp_path):
    code, lines = end(check("--at-once", 1, "bad", "nosuch", "good"))
    assert code == 1
    begun = lines.index("----- bad: " + str(tmp_path / "build/check/bad.log"))
    assert lines[begun + 1:begun + 3] == ["first words of bad", "last words of bad"]
    assert [line for line in lines if "No rule to make target" in line and "nosuch" in line]
    assert [line for line in lines if re.fullmatch(r"check: good ok, \d+ s: all of it", line)]
    assert lines[-2:] == ["check: failed: bad (exit code 2; build/check/bad.log)",
                          "check: failed: nosuch (exit code 2; build/check/nosuch.log)"]
    assert (tmp_path / "build/check/good.log").read_text().startswith("good words\n")


def test_two_at_once(check):
    """Each of the two waits for the other."""
    code, lines = end(check("one", "two"))
    assert code == 0 and len([line for line in lines if "both are there" in line]) == 2, lines


def test_one_at_a_time_in_order(check):
    _, lines = end(check("--at-once", 1, "good", "bad"))
    assert lines.index("check: bad begins") > next(i for i, line in enumerate(lines) if line.startswith("check: good ok"))


def test_what_takes_too_long_is_ended_and_shown(check, tmp_path):
    code, lines = end(check("--at-once", 1, "--limit", 10, "endless", "good"))
    assert code == 1
    assert lines[lines.index("----- endless: " + str(tmp_path / "build/check/endless.log")) + 1] == "words of endless"
    assert [line for line in lines if re.fullmatch(r"check: good ok, \d+ s: all of it", line)]
    assert lines[-1] == "check: failed: endless (ended: it took too long; build/check/endless.log)"
    wait_for_end_of(int((tmp_path / "pid").read_text()))


def state_of(pid):
    """The letter of a process's state, Z when nobody has asked for its exit code yet; empty: it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def wait_for_end_of(pid):
    until = time.monotonic() + PATIENCE
    while (state := state_of(pid)) not in ("", "Z") and time.monotonic() < until:
        time.sleep(0.01)
    assert state in ("", "Z")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_ends_the_stages(check, tmp_path, number):
    process = check("slow", "good")
    until = time.monotonic() + PATIENCE
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith("\n")):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.01)
    pid = int((tmp_path / "pid").read_text())
    process.send_signal(number)
    code, lines = end(process)
    assert code == 128 + number and "words of slow" in lines
    wait_for_end_of(pid)
