"""The peers' environments and how their scripts are run; the peers themselves are measured, not tested."""
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from benchmarks import peers
from benchmarks.peers import __main__ as command

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """import json, os, sys, sample
if sys.argv[1] == "fail":
    sys.exit("it failed")
if sys.argv[1] == "sleep":
    import pathlib, time
    pathlib.Path(sys.argv[2]).write_text(str(os.getpid()))
    time.sleep(60)
print("noise")
print(json.dumps({"version": sample.VERSION, "arguments": sys.argv[1:], "threads": os.environ["OMP_NUM_THREADS"], "python": sys.prefix})
      if sys.argv[1] != "mute" else "no figures")
"""


def make_wheel(folder, version):
    info = f"sample-{version}.dist-info"
    with zipfile.ZipFile(folder / f"sample-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("sample.py", f"VERSION = '{version}'\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: sample\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def peer(tmp_path, monkeypatch):
    """A peer named sample, whose package is made here; pip looks nowhere else."""
    for version in "1.0", "2.0":
        make_wheel(tmp_path, version)
    for name in list(os.environ):
        if name.startswith("PIP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.setattr(peers, "SCRIPTS", tmp_path)
    monkeypatch.setattr(peers, "ENVIRONMENTS", tmp_path / "peers")
    monkeypatch.setattr(peers, "PACKAGES", {"sample": ["sample==1.0"]})
    monkeypatch.setattr(peers, "PEERS", {"sample": ("sample", "script.py")})
    return tmp_path


@pytest.mark.slow
def test_run(peer, monkeypatch, capfd):
    found = peers.run("sample", "data", dim=100, output=None, rate=0.5)
    assert found == {"peer": "sample", "version": "1.0", "arguments": ["data", "--dim", "100", "--rate", "0.5"], "threads": "1",
                     "python": str(peer / "peers/sample")}
    assert capfd.readouterr().err.count("installing") == 1
    assert peers.run("sample", "data")["version"] == "1.0"
    assert "installing" not in capfd.readouterr().err
    monkeypatch.setitem(peers.PACKAGES, "sample", ["sample==2.0"])
    assert peers.run("sample", "data")["version"] == "2.0"
    with pytest.raises(peers.PeerError, match=r"^the peer sample ended with code 1$"):
        peers.run("sample", "fail")
    with pytest.raises(peers.PeerError, match=r"^the peer sample printed no figures$"):
        peers.run("sample", "mute")
    with pytest.raises(peers.PeerError, match=r"^the peer sample took more than 1\.0 s$"):
        peers.run("sample", "sleep", peer / "pid", timeout=1.0)
    with pytest.raises(ProcessLookupError):
        os.kill(int((peer / "pid").read_text()), 0)


@pytest.mark.slow
def test_no_package(peer, monkeypatch):
    monkeypatch.setitem(peers.PACKAGES, "sample", ["sample==3.0"])
    for _ in range(2):              # what is half made is not taken for an environment
        with pytest.raises(peers.PeerError, match=r"^pip install sample==3\.0 ended with code 1$"):
            peers.run("sample", "data")


def test_unknown_peer():
    with pytest.raises(peers.PeerError, match="there is no peer 'fast'; there are gensim, "):
        peers.run("fast")


def test_tables():
    for environment, script in peers.PEERS.values():
        assert environment in peers.PACKAGES
        assert (peers.SCRIPTS / script).is_file()


def test_command_line():
    assert command.parse(["a", "--dim", "100", "b", "--rate=-1"]) == (["a", "b"], {"dim": "100", "rate": "-1"})
    with pytest.raises(peers.PeerError, match="the option --dim has no value"):
        command.parse(["a", "--dim"])
    done = subprocess.run([sys.executable, "-m", "benchmarks.peers", "gensim", "--dim"], cwd=ROOT, capture_output=True, text=True,
                          timeout=60)
    assert (done.returncode, done.stderr) == (1, "peers: the option --dim has no value\n")


def test_scripts_share(tmp_path, monkeypatch):
    """What the scripts import of each other needs no peer."""
    monkeypatch.syspath_prepend(str(peers.SCRIPTS))
    import measure
    import ratings
    head = "%%MatrixMarket matrix coordinate real general\n"
    (tmp_path / "train.mmc").write_text(f"{head}% a comment\n3 4 2\n1 4 2.5\n3 1 -1\n")
    (tmp_path / "test.mmc").write_text(f"{head}3 4 1\n2 2 4\n")
    (train, test), size = ratings.read(tmp_path)
    assert size == (3, 4)
    assert [part.tolist() for part in train] == [[0, 2], [3, 0], [2.5, -1.0]]
    assert [part.tolist() for part in test] == [[1], [1], [4.0]]
    assert ratings.rmse([1, 2], np.array([4.0, 6.0])) == pytest.approx(12.5**0.5)
    with measure.Clock() as clock:
        sum(range(10**5))
    assert clock.wall > 0
    assert clock.cpu >= 0


def test_answer(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(peers.SCRIPTS))
    import measure
    with measure.Clock() as clock:
        pass
    measure.answer("numpy", clock, words=3)
    nothing = pytest.approx(0, abs=1)
    assert json.loads(capsys.readouterr().out) == {"version": np.__version__, "wall": nothing, "cpu": nothing, "words": 3}
