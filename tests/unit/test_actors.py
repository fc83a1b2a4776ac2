"""Threads as the simulation's actors do what greenlets do, and leave nothing behind. This runs in the sanitizers' builds, too."""
import threading

import pytest

from lapse.testing import Simulation, Violation, actors, campaign
from lapse.testing.actors import Actor, actors_of, current_actor


def settings():
    return campaign.configurations(nodes=[2, 4], workers=[1, 3], keys=[1, 4])


@pytest.mark.skipif(actors.DEFAULT != "greenlets", reason="no greenlets in a sanitizer's build")
def test_same_seed_same_trace():
    pytest.importorskip("greenlet")
    for seed in range(1, 60):
        chosen = campaign.setting_of(seed, settings())
        assert Simulation(seed, **chosen, actors="threads").run() == Simulation(seed, **chosen, actors="greenlets").run()
    with pytest.raises(Violation) as one:
        Simulation(1, faults="duplicate", actors="greenlets").run()
    with pytest.raises(Violation) as other:
        Simulation(1, faults="duplicate", actors="threads").run()
    assert str(one.value) == str(other.value)


def test_threads_find_nothing_in_the_protocol():
    for seed in range(1, 120):
        Simulation(seed, **campaign.setting_of(seed, settings()), actors="threads").run()
    assert threading.active_count() < 10


@pytest.mark.parametrize("fault", ["no_next", "lost_update", "split_route", "drop_queue", "loss", "duplicate"])
def test_threads_find_faults(fault):
    found = 0
    for seed in range(1, 40):
        try:
            Simulation(seed, mode="async", faults=fault, actors="threads").run()
        except Violation:
            found += 1
    assert found
    assert threading.active_count() < 10            # a schedule that has failed ends its threads, too


def test_what_an_actor_raises():
    """It comes out of the switch of whoever made the actor, when the actor has ended."""
    def fails():
        other.switch()
        raise LookupError("x")

    def ends():
        main.switch()

    main, failing, other = current_actor(), Actor(fails), Actor(ends)
    failing.switch()                    # which switches to the other one, and that back to here
    with pytest.raises(LookupError):
        failing.switch()
    assert failing.dead
    assert not failing.thread.is_alive()
    assert not other.dead
    other.switch()
    assert other.dead


def test_kinds():
    assert actors_of("threads") == (Actor, current_actor)
    with pytest.raises(ValueError, match="greenlets, threads"):
        actors_of("fibers")
    with pytest.raises(ValueError, match="actors"):
        Simulation(1, actors="fibers")
