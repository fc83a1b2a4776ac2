"""What the README shows: its commands and its examples, for the tests of it and for `make seed`.

Blocks marked `sh` are commands, one a line; blocks marked `python` are programs of one node. Another mark (`text`, `console`, `bibtex`)
is for what is not meant to be run.
"""
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What `make check` runs anyway, or what needs a machine of its own.
ELSEWHERE = re.compile(r"make (check|seed|test|bench|docs|model|sim|asan|tsan|packaging|dev)\b|(python3? -m )?(pip install|venv)"
                       r"|git clone|cd |source |\. ")


def blocks(language):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands():
    return [line for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines()
            if line.strip() and not line.lstrip().startswith("#") and not ELSEWHERE.match(line)]
