"""Memory stays flat: tests/cluster/leaks.py in its quick form (`make leaks`: 10^6 operations), that it can fail, and refused frames."""
import ctypes
import re
import sys
from pathlib import Path

import pytest
from launched import ROOT

from tests.ext.probe_build import load_extension

sys.path.insert(0, str(ROOT / "tests/cluster"))
sys.path.insert(0, str(ROOT / "tests/unit"))
import leaks
from test_protocol import ACK, HAND_OVER, LENGTHS, LOCALIZE, PULL, PUSH, SET, TRANSFER, VALUES, message

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists() or leaks.Looks().info is None, reason="needs /proc and mallinfo2")


@pytest.mark.slow
@pytest.mark.parametrize(("nodes", "options"), [(1, ""), (2, ""), (2, "--only sample --scheme local"), (2, "--only sample --scheme preloc"),
                                                (2, "--only localize --sys.location_caches 1")])
def test_every_kind_of_operation(jobs, nodes, options):
    command = ["tests/cluster/leaks.py", *options.split()]
    result = jobs.launch(nodes, *command) if nodes > 1 else jobs.run(sys.executable, *command)
    assert result.code == 0, result.text
    assert "WRONG" not in result.text
    words = re.compile(r"node \d leaks: OK \((\d) nodes, (\d+) kinds, 0 grow\)")
    closing = [match for line in result.lines if (match := words.fullmatch(line))]
    assert len(closing) == nodes, result.text
    assert {int(match[1]) for match in closing} == {nodes}
    assert all(int(match[2]) >= (30 if "--only" not in options else 2) for match in closing), result.text


@pytest.mark.parametrize(("what", "every", "word"), [("malloc", 16, "bytes"), ("object", 100, "objects"), ("block", 100, "blocks")])
def test_a_small_leak_is_seen(what, every, word, capsys):
    """16 bytes in each 16th operation; an object or a number in each hundredth."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    kept = []

    def leaky(n):
        for i in range(n):
            if i % every == 0:
                if what == "malloc":
                    libc.malloc(ctypes.c_size_t(16))
                else:
                    kept.append([] if what == "object" else i + 12345.5)

    assert word in leaks.measure(what, leaky, 300_000, lambda: None, leaks.Looks(), False)
    assert "WRONG" in capsys.readouterr().out
    assert leaks.measure(what, lambda n: None, 300_000, lambda: None, leaks.Looks(), True) == ""


def test_refused_frames():
    probe = load_extension(ROOT / "tests/ext/protocol_probe.pyx")
    node = probe.Probe(8, 0, 2, dtype="float32", visible=LENGTHS, stored=LENGTHS)
    values = bytes(4 * 9)
    frames = [message(PULL, [9]), message(PULL, [1], reserved=3), message(PULL, [1, 2, 3], count=7), message(PUSH, [1], values=values),
              message(SET, [1, 2], values=bytes(8)), message(LOCALIZE, [5]), message(LOCALIZE, [1, 1]), message(LOCALIZE, [0, 1, 2, 6]),
              message(HAND_OVER, [4]), message(HAND_OVER, [1, 2, 4], [1, 1, 1]), message(HAND_OVER, [0, 1], [1, 7]),
              message(TRANSFER, [5], values=bytes(4 * 6)), message(VALUES, [4], values=bytes(4 * 5), origin=0),
              message(ACK, [4], origin=0), message(77, [4]), b"", b"nothing of ours", message(PULL, [1])[:-3]]

    def refuse(n):
        for _ in range(n // len(frames)):
            for frame in frames:
                assert node.handle(frame, 1) < 0
        node.sink.sent.clear()

    assert leaks.measure("refused frames", refuse, 60_000, lambda: None, leaks.Looks(), False) == ""
    assert node.sink.unsent == 0
