"""How tests/conftest.py spreads tests over processes: a process that dies in a test costs that test, and the run ends."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
NUMBER = 40
PROGRAM = f"""
import os, time, pytest
from pathlib import Path

time.sleep(SLOW)

@pytest.mark.parametrize("i", range({NUMBER}))
def test_it(i):
    with open("begun", "a") as file:
        file.write(f"{{i}} ")
    if i in DIES:
        end = time.monotonic() + 60
        time.sleep(SLOW * DIES.index(i))        # the second dies while the one that replaces the first is still looking for the tests
        while WAITS and len(Path("begun").read_text().split()) < {NUMBER} - 1 and time.monotonic() < end:    # this process holds one back
            time.sleep(0.01)
        os._exit(3)
"""


@pytest.mark.parametrize(("dies", "waits", "slow"), [
    ([0], True, 0), ([NUMBER // 2], False, 0), ([NUMBER - 1], False, 0), ([0, 1], False, 1), ([0, 1], False, 0), ([0, 1, 2], False, 0.5)])
def test_a_process_that_dies_in_a_test(tmp_path, dies, waits, slow):
    """Also when all others have got to their end meanwhile (waits), and when several die."""
    (tmp_path / "test_one.py").write_text(PROGRAM.replace("DIES", str(dies)).replace("WAITS", str(waits)).replace("SLOW", str(slow)))
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run([sys.executable, "-m", "pytest", "-p", "conftest", "-n", "3", "-q", "-p", "no:cacheprovider"], cwd=tmp_path,
                          env={**environment, "PYTHONPATH": str(TESTS)}, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(rf"^{len(dies)} failed, {NUMBER - len(dies)} passed", done.stdout, re.MULTILINE), done.stdout
    for number in dies:
        assert f"crashed while running 'test_one.py::test_it[{number}]'" in done.stdout
    assert sorted(map(int, (tmp_path / "begun").read_text().split())) == list(range(NUMBER))
