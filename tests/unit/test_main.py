"""`python -m lapse`."""
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import zmq

import lapse.__main__
from lapse import _build
from lapse._version import __version__
from lapse.programs import PROGRAMS

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "lapse", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_versions():
    done = run()
    assert done.returncode == 0 and done.stderr == ""
    told = dict(line.split(":", 1) for line in done.stdout.splitlines())
    assert [value.strip() for value in (told["lapse"], told["numpy"], told["pyzmq"], told["libzmq"])] == [
        __version__, numpy.__version__, zmq.__version__, zmq.zmq_version()]
    assert told["curve"].strip() == ("yes" if zmq.has("curve") else "no")
    assert _build.kind in told["build"] and _build.flags in told["build"]


def test_kind_of_build():
    assert _build.kind in ("release", "debug", "asan", "tsan")
    assert _build.debug == (_build.kind != "release")
    assert "-march" not in _build.flags and "-ffast-math" not in _build.flags
    if _build.kind == "release":
        assert "-O3" in _build.flags


@pytest.mark.parametrize("arguments", [["wrong"], ["--wrong"], ["wrong", "run"]])
def test_wrong_command(arguments):
    done = run(*arguments)
    assert done.returncode == 2 and done.stdout == "" and "usage: python -m lapse" in done.stderr


def test_help():
    done = run("--help")
    assert done.returncode == 0 and "usage: python -m lapse" in done.stdout


def test_run_goes_to_the_launcher(monkeypatch):
    launch = pytest.importorskip("lapse.launch")
    seen = []
    monkeypatch.setattr(launch, "main", lambda argv: seen.append(argv) or 7)
    assert lapse.__main__.main(["run", "-s", "2", "true"]) == 7
    assert seen == [["-s", "2", "true"]]


@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_programs(name, tmp_path):
    """Each is there and takes its options, wherever it is called."""
    done = subprocess.run([sys.executable, "-m", "lapse", name, "--help"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and done.stdout.startswith("usage: ") and done.stderr == ""
    assert f"  {name} " in run("--help").stdout


def test_small_data():
    assert (Path(run("data").stdout.strip()) / "lm/small.txt").is_file()


def test_an_application_beats_a_package_apps_of_the_user(tmp_path):
    (tmp_path / "apps").mkdir()
    (tmp_path / "apps/__init__.py").write_text("raise SystemExit('the wrong package')")
    done = subprocess.run([sys.executable, "-m", "lapse", "mf", "--help"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and "--rank" in done.stdout
