"""The Makefile and setup.py, in a small tree of their own: what is built when, also by several at once."""
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = "import sys\nimport lapse.core\nif __name__ == '__main__':\n    print(lapse.core.answer(), *sys.argv[1:])\n    sys.exit(3)\n"
FILES = {
    "lapse/__init__.py": "", "lapse/_version.py": "__version__ = '1'\n", "lapse/words.pxd": "cdef enum:\n    ANSWER = 42\n",
    "lapse/core.pyx": "from lapse.words cimport ANSWER\ndef answer():\n    return ANSWER\n",
    "apps/hello.py": PROGRAM, "apps/library.py": "", "apps/mf/kernel.pyx": "def name():\n    return 'mf'\n",
    "apps/matrix_factorization.py": "from apps.mf import kernel\nif __name__ == '__main__':\n    print(kernel.name())\n",
    "tests/cluster/test_it.py": PROGRAM, "README.md": "",
}


@pytest.fixture
def tree(tmp_path):
    for name in ("Makefile", "setup.py", "pyproject.toml", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "tools", tmp_path / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def start(tree, *arguments, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("LAPSE_", "MAKE", "MFLAGS"))}
    return subprocess.Popen(["make", f"PYTHON={sys.executable}", *arguments], cwd=tree, env=clean | environment,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def make(tree, *arguments, code=0, **environment):
    """Run make; return what it printed."""
    process = start(tree, *arguments, **environment)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == code, output
    return output


def run(tree, program, *arguments):
    done = subprocess.run([tree / "build" / program, *arguments], cwd="/", capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout.strip(), done.stderr


def built(tree):
    return {path.name: path.stat().st_mtime_ns for path in tree.glob("lapse/*.so")}


def touch(path):
    """Give a file a time that is later than that of everything built so far, on coarse clocks too."""
    os.utime(path, times=(time.time() + 2, time.time() + 2))


def test_everything_in_parallel_and_nothing_twice(tree):
    make(tree, "-j", "4")
    assert {path.name for path in tree.glob("build/apps/*")} == {"hello", "matrix_factorization"}
    assert run(tree, "apps/hello", "a b", "-v") == (3, "42 a b -v", "")
    assert run(tree, "tests/test_it") == (3, "42", "")
    assert run(tree, "apps/matrix_factorization") == (0, "mf", "")
    before = built(tree)
    assert "setup.py" not in make(tree, "-j", "4")
    assert "setup.py" not in make(tree, "apps/hello", "tests/test_it", "ps")
    assert built(tree) == before and before


def test_a_program_alone(tree):
    make(tree, "apps/hello")
    assert run(tree, "apps/hello")[1] == "42"
    assert not list(tree.glob("apps/mf/*.so"))
    make(tree, "-j", "4", "apps/matrix_factorization")
    assert run(tree, "apps/matrix_factorization")[1] == "mf"


def test_changes_are_seen(tree):
    make(tree, "apps/hello")
    (tree / "lapse/words.pxd").write_text("cdef enum:\n    ANSWER = 43\n")
    touch(tree / "lapse/words.pxd")
    make(tree, "apps/hello")
    assert run(tree, "apps/hello")[1] == "43"


def test_changed_flags_rebuild_and_rebuild_back(tree):
    def sizes():
        return [path.stat().st_size for path in sorted(tree.glob("**/*.so")) if "build" not in path.relative_to(tree).parts]
    make(tree, "all")
    release = sizes()
    make(tree, "apps/hello", LAPSE_BUILD="debug")      # the core only; the kernels follow when they are asked for
    make(tree, "all", LAPSE_BUILD="debug")
    assert all(debug != other for debug, other in zip(sizes(), release, strict=True))
    make(tree, "all")
    assert sizes() == release
    assert "must be one of" in make(tree, "all", LAPSE_BUILD="fast", code=2)


def test_two_builds_at_once(tree):
    processes = [start(tree, "-j", "4", "apps/hello"), start(tree, "-j", "4", "apps/hello", "tests/test_it")]
    for process in processes:
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 0, output
    assert run(tree, "apps/hello")[1] == run(tree, "tests/test_it")[1] == "42"


def test_errors(tree):
    assert "apps/nosuch" in make(tree, "apps/nosuch", code=2)
    (tree / "lapse/core.pyx").write_text("def answer(:\n")
    output = make(tree, "apps/hello", code=2)
    assert "lapse/core.pyx:1" in output and "Traceback" not in output
    assert not (tree / "build/apps/hello").exists()


def test_clean_and_help(tree):
    make(tree, "all")
    make(tree, "clean")
    assert not list(tree.rglob("*.so")) and not list((tree / "build").iterdir())
    output = make(tree, "help")
    assert all(f"make {target} " in output for target in ("ps", "apps", "tests", "test", "check", "bench", "lint", "asan", "tsan", "clean"))
