"""Every command and every example of the README runs: here, or by `make seed`, whose own rules are tested here, too."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools import readme, seed
from tools.readme import ROOT

# `make seed` runs the others, and looks at what they print.
COMMANDS = [command for command in readme.commands() if seed.check_of(command) is None]
EXAMPLES = readme.blocks("python")


def test_there_is_something_to_run():
    assert COMMANDS and EXAMPLES


def test_every_check_of_the_seed_has_a_command():
    for pattern, _ in seed.CHECKS:
        assert [command for command in seed.plan() if re.fullmatch(pattern, seed.bare(command))], f"no command is {pattern}"


def test_the_seed_goes_on_after_a_failure(tmp_path, monkeypatch, capsys):
    commands = ["echo one", "echo two", "exit 3", "sleep 60 & echo three"]
    monkeypatch.setattr(seed, "FOLDER", tmp_path / "seed")
    monkeypatch.setattr(seed.readme, "ROOT", tmp_path)
    monkeypatch.setattr(seed, "clone", lambda tree: tree.mkdir(parents=True))
    monkeypatch.setattr(seed, "plan", lambda: commands)
    monkeypatch.setattr(seed, "CHECKS", [("echo one", seed.says("one")), ("echo two", seed.says("three")), (".*", lambda text: None)])
    assert seed.main([]) == 1
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said if " s  " in line] == ["ok", "FAILED", "FAILED", "ok"]
    assert said[-3:-1] == ["seed: failed: echo two: 0 lines are 'three', not 1 (see seed/01.log)",
                           "seed: failed: exit 3: exit code 3 (see seed/02.log)"]
    assert said[-1].startswith("seed: 2 passed, 2 failed in ")
    assert (tmp_path / "seed/01.log").read_text() == "two\n"
    assert seed.main(["one"]) == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command):
    """The line as it stands, with the Python of this test first on the path, and lapse as if it were installed."""
    shell = ["bash", "-euo", "pipefail", "-c", f'PATH="$1:$PATH"; {command}', "bash", str(Path(sys.executable).parent)]
    installed = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(shell, cwd=ROOT, env=installed, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900,
                          check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("example", EXAMPLES)
def test_example(example, tmp_path):
    program = tmp_path / "example.py"
    program.write_text(example)
    launcher = f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r}); runpy.run_path({str(program)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", launcher], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120,
                          cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout
