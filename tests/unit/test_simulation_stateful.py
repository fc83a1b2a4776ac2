"""Hypothesis chooses who does what next in a simulated cluster; what it finds, it shrinks to a few steps.

A step here is a whole operation of a worker, or a whole message, so bugs that need somebody to come in between are for the simulation's own
schedules. Examples are derived from the tests' code alone: each run is the same.
"""
import pytest

from lapse.testing import Cluster, Violation

pytest.importorskip("hypothesis")

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

KEYS = 4                                # three are added to, one is set
FAULTS = ["late_directory", "no_queue", "drop_queue", "no_next", "no_copy", "old_epoch", "reverse_queue", "queue_lost", "overwrite_next",
          "loss", "duplicate"]


def machine(fault=0):
    class Steps(RuleBasedStateMachine):
        cluster = None
        failed = False

        def step(self, method, *args):
            try:
                return method(*args)
            except Violation:
                self.failed = True
                raise

        @initialize(nodes=st.integers(2, 3), workers=st.integers(1, 2), caches=st.booleans(), shared_memory=st.booleans(),
                    lengths=st.sampled_from(["uniform", "mixed"]), seed=st.integers(0, 7))
        def start(self, nodes, workers, **chosen):
            self.cluster = Cluster(nodes, workers, KEYS - 1, registers=1, faults=fault, **chosen)
            self.nodes, self.workers = nodes, workers
            self.added = [key for key in range(KEYS) if key not in self.cluster.registers]

        def act(self, node, worker, kind, keys):
            self.step(self.cluster.issue, node % self.nodes, worker % self.workers, kind, keys)

        @rule(node=st.integers(0, 2), worker=st.integers(0, 1), keys=st.lists(st.integers(0, KEYS - 1), min_size=1, max_size=4))
        def pull(self, node, worker, keys):
            self.act(node, worker, "pull", keys)

        @rule(node=st.integers(0, 2), worker=st.integers(0, 1), keys=st.lists(st.integers(0, KEYS - 1), min_size=1, max_size=4))
        def localize(self, node, worker, keys):
            self.act(node, worker, "localize", keys)

        @rule(node=st.integers(0, 2), worker=st.integers(0, 1), places=st.lists(st.integers(0, KEYS - 2), min_size=1, max_size=4))
        def push(self, node, worker, places):
            self.act(node, worker, "push", [self.added[place] for place in places])

        @rule(node=st.integers(0, 2), worker=st.integers(0, 1), times=st.integers(1, 2))
        def set_register(self, node, worker, times):
            self.act(node, worker, "set", self.cluster.registers * times)

        @rule(picks=st.lists(st.integers(0, 8), min_size=1, max_size=6))
        def deliver(self, picks):
            for pick in picks:
                channels = self.cluster.waiting()
                if channels:
                    self.step(self.cluster.deliver, *channels[pick % len(channels)])

        @rule(node=st.integers(0, 2), worker=st.integers(0, 1))
        def collect(self, node, worker):
            self.step(self.cluster.collect, node % self.nodes, worker % self.workers)

        @invariant()
        def keeps_the_promise_so_far(self):
            if self.cluster is not None and not self.failed:
                self.step(self.cluster.check)

        def teardown(self):
            if self.cluster is not None and not self.failed:
                self.cluster.rest()

    return Steps


def explore(fault, examples, steps=40, **more):
    run_state_machine_as_test(machine(fault), settings=settings(max_examples=examples, stateful_step_count=steps, derandomize=True,
                                                                deadline=None, database=None, report_multiple_bugs=False, **more))


def test_no_step_breaks_the_promise():
    explore(0, 150)


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault, capsys):
    with pytest.raises(Violation):
        explore(fault, 400, phases=[Phase.generate])
    capsys.readouterr()


def test_what_is_found_is_shrunk(capsys):
    """The falsifying example has no more than what the fault needs."""
    with pytest.raises(Violation) as found:
        explore("late_directory", 200, steps=12)
    text = "\n".join(getattr(found.value, "__notes__", [])) + capsys.readouterr().out
    steps = [line for line in text.splitlines() if line.strip().startswith("state.") and "teardown" not in line
             and "keeps" not in line]
    assert 3 <= len(steps) <= 6, text
    assert any("state.localize" in step for step in steps)
    assert not any("state.push" in step or "state.pull" in step for step in steps)


def test_cluster_refuses():
    cluster = Cluster(2, 1, 2, registers=1)
    register, = cluster.registers
    with pytest.raises(ValueError, match="registers are set"):
        cluster.issue(0, 0, "push", [register])
    with pytest.raises(ValueError, match="there is none"):
        cluster.issue(0, 0, "pull", [3])
    with pytest.raises(ValueError, match="1 to 80 keys"):
        cluster.issue(0, 0, "pull", [])
    assert cluster.deliver(0, 1) is False
    cluster.rest()
