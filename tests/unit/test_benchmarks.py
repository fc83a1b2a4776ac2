"""Each benchmark runs, with tiny sizes, and yields finite figures. How fast it is plays no part."""
import json
import math
import sys

import pytest

from lapse import _build

if _build.kind != "release":
    pytest.skip("nothing to measure in a build that is slow on purpose", allow_module_level=True)
pytest.importorskip("benchmarks._loops", reason="the benchmarks are not compiled (make kernels)")

from benchmarks import __main__ as command
from benchmarks import calls, kge, memory, mf, remote, report, rescal, rows, sampling, security, w2v, w2v_text

SIZES = {
    rows: {"num_keys": 2000, "keys_per_call": 100, "rounds": 2, "rows": 2000},
    calls: {"num_keys": 2000, "rounds": 2, "calls": 500, "keys_per_call": 100, "slice": 60_000_000},
    remote: {"num_keys": 20_000, "rounds": 2, "short_rounds": 2, "calls": 20, "flights": 50, "window": 16,
             "keys_per_call": 10, "batches": 5, "batch": 100},
    security: {"num_keys": 100_000, "rounds": 2, "calls": 20, "flights": 20, "window": 8},
    memory: {"few": 50_000, "many": 100_000},
    mf: {"rows": 300, "cols": 200, "cells": 5000, "tests": 100, "rank": 8, "rounds": 2, "epochs": 3, "movielens": 0},
    sampling: {"num_keys": 2000, "rounds": 2, "draws": 6400},
    kge: {"triples": 2000, "rounds": 1, "peer_rounds": 0},
    rescal: {"triples": 500, "parts": (1, 2), "rounds": 1, "peer": False},
    w2v: {"words": 200_000, "rounds": 1},
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("benchmark", SIZES, ids=lambda benchmark: benchmark.__name__)
def test_runs(benchmark):
    found = benchmark.run(size=SIZES[benchmark])
    assert found
    for row in found:
        assert math.isfinite(row.measured), row
        assert row.against == "" or math.isfinite(row.reference), row
        assert benchmark is memory or row.unit == "%" or row.measured > 0, row
        if row.bound:
            assert row.verdict in ("met", "MISSED")
    for text in (report.plain(found), report.markdown(found)):
        assert len(text.splitlines()) == len(found) + 2


def test_every_benchmark_is_tried_here():
    assert set(command.BENCHMARKS.values()) == {*SIZES, w2v_text}       # w2v_text is gensim's: it needs the real text


def test_verdict():
    assert report.Row("a", 1.0, "us", 2.0, "echo", 0.5, "<= 0.5").verdict == "met"
    assert report.Row("a", 1.0, "us", 2.0, "echo", 0.51, "<= 0.5").verdict == "MISSED"
    assert report.Row("a", 9.0, "B", bound="<= 10").verdict == "met"
    assert report.Row("a", 9.0, "B").verdict == ""


def test_ratio_is_of_each_round():
    row = report.against("a", [1.0, 10.0, 4.0], "us", "echo", [1.0, 5.0, 1.0])
    assert (row.measured, row.reference, row.ratio) == (4.0, 1.0, 2.0)


def test_command_line(tmp_path, monkeypatch, capsys):
    """Results are kept by benchmark; a broken one gives exit code 1, a slow one does not; the README's table is replaced."""
    kept, readme = tmp_path / "build" / "bench.json", tmp_path / "README.md"
    readme.write_text(f"before\n{command.BEGIN}\nold\n{command.END}\nafter\n")
    monkeypatch.setattr(command, "ROOT", tmp_path)
    monkeypatch.setattr(command, "KEPT", kept)
    monkeypatch.setattr(command, "README", readme)
    monkeypatch.setattr(rows, "run", lambda quick: [report.Row("slow", 1.0, "M rows/s", 2.0, "np.take", 0.5, ">= 1.2")])
    monkeypatch.setattr(memory, "run", lambda quick: 1 / 0)
    assert command.main(["--only", "local"]) == 0
    assert "MISSED" in capsys.readouterr().out
    assert command.main(["--only", "memory"]) == 1
    assert list(json.loads(kept.read_text())) == ["local"]
    assert command.main(["--show", "--readme"]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text and "| slow |" in text
