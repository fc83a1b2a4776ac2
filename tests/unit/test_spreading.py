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

@pytest.mark.parametrize("i", range({NUMBER}))
def test_it(i):
    with open("begun", "a") as file:
        file.write(f"{{i}} ")
    if i == DIES:
        end = time.monotonic() + 60
        while WAITS and len(Path("begun").read_text().split()) < {NUMBER} - 1 and time.monotonic() < end:    # this process holds one back
            time.sleep(0.01)
        os._exit(3)
"""


@pytest.mark.parametrize(("dies", "waits"), [(0, True), (NUMBER // 2, False), (NUMBER - 1, False)])
def test_a_process_that_dies_in_a_test(tmp_path, dies, waits):
    """Also when all others have got to their end meanwhile (waits)."""
    (tmp_path / "test_one.py").write_text(PROGRAM.replace("DIES", str(dies)).replace("WAITS", str(waits)))
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run([sys.executable, "-m", "pytest", "-p", "conftest", "-n", "3", "-q", "-p", "no:cacheprovider"], cwd=tmp_path,
                          env={**environment, "PYTHONPATH": str(TESTS)}, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(rf"^1 failed, {NUMBER - 1} passed", done.stdout, re.MULTILINE), done.stdout
    assert f"crashed while running 'test_one.py::test_it[{dies}]'" in done.stdout
    assert sorted(map(int, (tmp_path / "begun").read_text().split())) == list(range(NUMBER))
