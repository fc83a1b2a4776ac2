"""The campaign of faults itself: that it finds what is wrong, and tells how to see it again; and a job with faulty channels."""
import re
import sys

import pytest


def test_an_outcome_that_takes_too_long_is_wrong(jobs):
    result = jobs.run(sys.executable, "tests/faults", "--only", "kill-barrier", "--runs", 1, "--seed", 3, "--patience", 0.0001)
    assert result.code == 1
    assert re.search(r"^WRONG: it took [\d.]+ s, not 0\.0005 s$", result.text, re.MULTILINE), result.text
    assert '  again: make faults ARGS="--only kill-barrier --seed 3 --runs 1"' in result.lines
    assert re.search(r"^\| kill-barrier \| 1 \| 1 \| \d+ \| [\d.]+ \| [\d.]+ \| 0\.0005 \|$", result.text, re.MULTILINE), result.text
    assert "1 jobs disturbed, 1 outcomes wrong" in result.text


def test_unknown_scenarios_are_no_success(jobs):
    result = jobs.run(sys.executable, "tests/faults", "--only", "nothing")
    assert result.code == 2
    assert "kill-storm: 100" in result.lines


@pytest.mark.parametrize(("what", "options"), [("loss=0.01", []), ("double=0.01", ["--workload", "race"]), ("reorder=0.01", [])])
def test_a_message_that_goes_wrong_ends_the_job_by_the_names_of_both_nodes(jobs, tmp_path, what, options):
    result = jobs.launch(3, "tests/cluster/test_consistency.py", "--pulls", 3_000_000, "--inject", what, "--out", tmp_path, *options)
    assert result.code == 1, result.text
    assert "WRONG" not in result.text
    match = re.search(r"^lapse: node (\d) \(.*\): broke the protocol: a message that was lost, doubled or out of order.*; "
                      r"noticed by node (\d) ", result.text, re.MULTILINE)
    assert match and match[1] != match[2], result.text


@pytest.mark.parametrize("loser", [0, 1])
def test_a_lost_message_that_none_follows_is_noticed(jobs, tmp_path, loser):
    """Node 0 asks, one key at a time and without a timeout, and node 1 answers: nothing follows a question or an answer that is lost."""
    script = tmp_path / "asking.py"
    script.write_text(f"""
import os
import numpy as np, lapse
from lapse.testing import injecting
if os.environ["LAPSE_RANK"] == "{loser}":
    injecting.inject({{"loss": 0.01}}, seed=1)
lapse.setup(8, 1, op_timeout=None)
server = lapse.Server(1)
kv = lapse.Worker(0, server)
if server.my_rank() == 1:
    kv.barrier()
value = np.empty(1, np.float32)
while True:
    kv.pull([7], value)
""")
    result = jobs.launch(2, script)
    assert result.code == 1, result.text
    assert re.search(rf"^lapse: node {loser} \(.*\): broke the protocol: a message that was lost, .*; noticed by node {1 - loser} ",
                     result.text, re.MULTILINE), result.text


def test_delayed_messages_change_nothing(jobs):
    result = jobs.launch(3, "tests/cluster/test_consistency.py", "--pulls", 20_000, "--inject", "delay=0.3")
    assert result.code == 0, result.text
    assert len(result.closing("test_consistency")) == 3


@pytest.mark.parametrize("what", ["los=0.1", "loss", "loss=x", "loss=2"])
def test_what_cannot_be_injected(jobs, what):
    result = jobs.run(sys.executable, "tests/cluster/test_consistency.py", "--inject", what)
    assert result.code == 2 and "--inject" in result.text, result.text
