"""`make model` finds what it is there to find: it fails where a bug is not caught, and where a configuration has an error."""
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(not shutil.which("spin"), reason="spin is not installed")


@pytest.fixture
def check(tmp_path):
    """check(model, name...) runs the runner, in a folder of its own."""
    def run(model, *names):
        return subprocess.run([sys.executable, ROOT / "verify/check.py", "--build", tmp_path / "build", "--model", model, "--only", *names],
                              capture_output=True, text=True, timeout=300, check=False)
    return run


@pytest.fixture
def changed(tmp_path):
    """A copy of the model with something replaced, which has to be there."""
    def write(pattern, replacement):
        text, count = re.subn(pattern, replacement, (ROOT / "verify/lapse.pml").read_text(encoding="utf-8"))
        assert count
        (tmp_path / "changed.pml").write_text(text, encoding="utf-8")
        return tmp_path / "changed.pml"
    return write


def test_the_model_as_it_is(check):
    done = check(ROOT / "verify/lapse.pml", "synchronous", "noting a next owner forgets the queue")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 configurations without an error, 1 bugs caught" in done.stdout


def test_a_bug_that_is_not_caught(check, changed):
    done = check(changed(r"\bB_DROP_QUEUE\b", "B_NOTHING"), "noting a next owner forgets the queue")
    assert done.returncode == 1 and "NOT CAUGHT" in done.stdout and "B_DROP_QUEUE: not caught" in done.stderr, done.stdout


def test_checks_that_are_not_there(check, changed):
    done = check(changed(r"assert\(\(condition\) \|\| name\)", "skip"), "channels change the order")
    assert done.returncode == 1 and "NOT CAUGHT" in done.stdout, done.stdout


def test_a_configuration_with_an_error(check, changed):
    done = check(changed(r"#ifdef B_DROP_QUEUE", "#ifndef B_DROP_QUEUE"), "three workers")
    assert done.returncode == 1 and "all_finished" in done.stderr and "spin -t" in done.stderr, done.stdout + done.stderr


@pytest.mark.parametrize("words", ["Warning: Search not completed", "error: max search depth too small", "pan: reached -DMEMLIM bound", ""])
def test_a_search_that_does_not_end(words):
    """Such a search may have found nothing: that is no proof."""
    spec = importlib.util.spec_from_file_location("verify_check", ROOT / "verify/check.py")
    runner = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runner)
    found = "State-vector 724 byte, depth reached 659, errors: 0\n    12863 states, stored\n"
    assert runner.read(found, 1.0, ROOT).finished
    assert not runner.read(f"{words}\n{found if words else ''}", 1.0, ROOT).finished


def test_a_model_that_is_wrong(check, changed):
    done = check(changed("proctype worker", "prictype worker"), "synchronous")
    assert done.returncode == 2 and "spin, synchronous" in done.stderr
