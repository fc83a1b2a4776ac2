"""Frames that nobody should send, without a fuzzer: nodes in real states, real messages, random changes. The long run: tools/fuzz.py."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("greenlet")         # (the names of the faults are the simulation's)

from lapse._build import kind
from lapse.testing.simulation import FAULTS
from tests.fuzz import _mutator, states

ROOT = Path(__file__).resolve().parents[2]
EXECUTIONS = 100_000 if kind == "release" else 20_000



@pytest.fixture(scope="module")
def places():
    return states.make_places()


@pytest.fixture(scope="module")
def corpus():
    return states.corpus()


def test_real_messages_are_accepted(places, corpus):
    before = _mutator.figures()
    for data in corpus:
        places[data[0]].feed(data[1:])
    after = _mutator.figures()
    assert after[0] - before[0] > 800
    assert after[1] == before[1]


def test_a_refused_frame_changes_nothing_and_an_accepted_one_only_what_it_may(places, corpus):
    before = _mutator.figures()
    found = _mutator.campaign(corpus, 1, EXECUTIONS)
    assert found is None, f"{found[1]}: {found[0].hex()}; {places[found[0][0] % len(places)].report()}"
    accepted, refused = (after - earlier for after, earlier in zip(_mutator.figures(), before))
    assert accepted > EXECUTIONS / 2 and refused > EXECUTIONS / 2


@pytest.mark.parametrize("fault", ["no_next", "late_directory", "no_queue", "old_epoch"])
def test_broken_promises_are_seen(places, corpus, fault):
    """The protocol's seeded bugs; a node that forgets to check was seen to be found when the checks were put in one by one."""
    beds = places[:states.BEDS]
    for bed in beds:
        bed.faults = FAULTS[fault]
    try:
        assert _mutator.campaign(corpus, 1, EXECUTIONS) is not None
    finally:
        for bed in beds:
            bed.faults = 0
            bed.feed(b"")


def test_the_same_numbers_give_the_same_inputs(corpus):
    assert corpus == states.corpus()
    assert [_mutator.mutate(data, 7, 5) for data in corpus] == [_mutator.mutate(data, 7, 5) for data in corpus]
    assert len(corpus) == len(set(corpus)) and sum(map(len, corpus)) < 200_000


def test_the_corpus_is_written(tmp_path, corpus):
    subprocess.run([sys.executable, "-m", "tests.fuzz.states", tmp_path / "corpus"], cwd=ROOT, check=True, timeout=60)
    assert sorted(path.read_bytes() for path in (tmp_path / "corpus").iterdir()) == sorted(corpus)
