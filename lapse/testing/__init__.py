"""Tools to test with: the deterministic simulation of a cluster, and the checker of histories.

`python -m lapse.testing` runs schedules of the simulation; it needs greenlet (`pip install lapse[testing]`).
"""
from lapse.testing.history import Finding, History, Recorder, check, check_registers

__all__ = ["Cluster", "Finding", "History", "Recorder", "Result", "Simulation", "Violation", "check", "check_registers"]


def __getattr__(name):
    # not imported above: the checker alone does without greenlet
    if name in ("Cluster", "Result", "Simulation", "Violation"):
        from lapse.testing import simulation
        return getattr(simulation, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
