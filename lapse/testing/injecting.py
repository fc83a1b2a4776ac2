"""A job whose channels lose, double, reorder or delay messages, to see that no value is wrong for it.

    from lapse.testing.injecting import inject
    inject({"loss": 0.001}, seed=1)         # before lapse.Server, in the process of each node

A node notices the first message that is lost, doubled or out of order by its number, and the job ends with NodeFailure, which names both
nodes. Delayed messages change nothing. The loss of what is the last message of a channel for a while is noticed within about a second, by
the MARK that follows, which nothing happens to.
"""
from __future__ import annotations

from collections.abc import Mapping

from lapse.node import Node
from lapse.testing._injecting import NAMES, InjectingVan

__all__ = ["NAMES", "inject", "parse"]


def inject(chances: Mapping[str, float], *, seed: int, longest: float = 0.02) -> None:
    """Let the nodes that this process makes from now on have faulty channels.

    chances: the probability of each of NAMES per message; seed: of what is drawn (per channel); longest: seconds of a delay.
    """
    def make(*arguments) -> InjectingVan:
        van = InjectingVan(*arguments)
        van.inject(dict(chances), seed, longest)
        return van

    Node.van_type = make


def parse(text: str) -> dict[str, float]:
    """{"loss": 0.01, "delay": 0.2} of "loss=0.01,delay=0.2"; ValueError for something else."""
    chances = {}
    for part in text.split(","):
        name, equals, number = part.partition("=")
        if name not in NAMES or not equals:
            raise ValueError(f"{part!r}: expected {', '.join(NAMES)}, each with =PROBABILITY")
        chances[name] = float(number)
    if not all(0 <= chance <= 1 for chance in chances.values()) or sum(chances.values()) > 1:
        raise ValueError(f"{text!r}: probabilities, which are at most 1 together")
    return chances
