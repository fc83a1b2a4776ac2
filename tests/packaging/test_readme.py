"""Every command and every example of the README runs.

Blocks marked `sh` are run line by line in a shell at the root of the tree, blocks marked `python` as a program of one node. Another mark
(`text`, `console`, `bibtex`) is for what is not meant to be run.
"""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# What `make check` runs anyway, or what needs a machine of its own.
ELSEWHERE = re.compile(r"make (check|test|bench|docs|model|asan|tsan|packaging|dev)\b|(python3? -m )?(pip install|venv)|git clone|cd "
                       r"|source |\. ")


def blocks(language):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines()
            if line.strip() and not line.lstrip().startswith("#") and not ELSEWHERE.match(line)]
EXAMPLES = blocks("python")


def test_there_is_something_to_run():
    assert COMMANDS and EXAMPLES


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
