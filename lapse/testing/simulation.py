"""The simulation of a cluster: one seed, one schedule, and a readable account of what went wrong in it."""
from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import NamedTuple, NoReturn

from lapse._protocol import VIOLATIONS
from lapse.testing._sim import FAULTS, Schedule
from lapse.testing.actors import actors_of
from lapse.testing.history import History, check, check_registers

MODES = {"sync": 100, "mixed": 50, "async": 0}      # percent of the operations that a worker waits for at once
LENGTHS = ("uniform", "mixed")                      # and "large": mixed, two values fill a frame
LARGE = 700_000                                     # numbers
SAMPLING = ("none", "naive", "preloc", "local")
NETWORK = 1 << 16                                   # fault bits from here on are the network's, those below the protocol's

_CALLS = {1: "pull", 2: "push", 3: "set", 4: "localize"}
_MESSAGES = {1: "PULL", 2: "PUSH", 3: "SET", 4: "LOCALIZE", 5: "HAND_OVER", 6: "TRANSFER", 7: "VALUES", 8: "ACK"}
_VERBS = ("begins", "has finished", "sends", "takes", "LOSES", "DOUBLES")
_PROBLEMS = {
    1: "key {key} has {a} owners and TRANSFERs in flight, not one",
    2: "nothing can go on, but {actor} has not finished",
    3: "still busy after {a} turns",
    4: "{actor} refuses a message: {violation}; key {key}, epoch {b}",
    5: "{actor} receives message {a} of a channel, expected {b}",
    6: "{actor} locks the channel to node {a} while it holds a key's latch",
    7: "{actor} locks the channel to node {a}, which it has locked already",
    8: "{actor} sends to or unlocks the channel to node {a} without having locked it",
    9: "{actor} sends a message of type {a} with {b} keys that has no room for them",
    10: "{actor} cannot issue an operation on key {key}: error {a}",
    11: "a value of key {key} is not in one piece",
    12: "key {key} is still in transfer to node {a}, at rest",
    13: "home says that node {a} owns key {key}, but node {b} does, at rest",
    14: "home says that key {key} has epoch {a}, its owner that it has {b}, at rest",
    15: "lost or doubled update: {a} pushes by one worker to key {key} were issued, {b} applied",
    16: "{actor} has {a} operations open and {b} keys pinned, at rest",
    17: "the audit at the end: node {a} and node {b} have different digests of the keys that the one is home of and the other owns",
}


class Result(NamedTuple):
    """What one schedule took. The same seed and settings give the same trace_hash everywhere."""
    seed: int
    turns: int
    switches: int
    messages: int
    operations: int
    relocations: int
    trace_hash: int


class Violation(Exception):
    """A schedule broke an invariant or the guarantee.

    problem: one sentence. key: the key that it is about, or -1. trace: lines, the last one last. command: what replays it. settings: the
    Simulation's.
    """

    def __init__(self, problem: str, key: int, trace: list[str], seed: int, command: str,
                 settings: dict | None = None):
        super().__init__(problem)
        self.problem, self.key, self.trace, self.seed, self.command = problem, key, trace, seed, command
        self.settings = dict(settings or {})

    def __reduce__(self):
        return Violation, (self.problem, self.key, self.trace, self.seed, self.command, self.settings)

    def __str__(self):
        lines = "\n".join("  " + line for line in self.trace)
        about = f" that concerns key {self.key}" if self.key >= 0 else ""
        return f"{self.problem}\nThe end of the trace{about}:\n{lines}\nReplay it with:\n  {self.command}"


class Simulation:
    """A cluster of `nodes` real protocol nodes with `workers` workers each, run in this thread in an order drawn from `seed`.

    Each worker does `ops` operations (pull, push, set, localize, of one or several keys, with duplicates) on `keys` keys that are added to
    and `registers` keys that are set. mode: "sync" waits for every operation, "async" for few before the end, "mixed" for half of them.
    sampling: the scheme that draws the keys of half of the pulls, or "none". caches: location caches. shared_memory: workers reach local
    keys directly. lengths: "uniform"; "mixed" where they differ; "large" where two values fill a message. positions: at most so many keys
    in a call.
    faults: names out of FAULTS (or their bits), for the tests that show that the tests find them. actors: "greenlets", or "threads" that
    do the same slowly; by default greenlets, but for sanitizers' builds.

    A Simulation runs once. One thread; local.
    """

    def __init__(self, seed: int, nodes: int = 3, workers: int = 2, keys: int = 3, ops: int = 12, mode: str = "mixed", *,
                 caches: bool = False, shared_memory: bool = True, faults: int | str | Iterable[str] = 0, registers: int = 1,
                 lengths: str = "uniform", sampling: str = "none", positions: int = 6, max_turns: int = 200_000, actors: str | None = None):
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed {seed}: must be in [0, 2**64)")
        if not 1 <= nodes <= 8 or workers < 1 or nodes * (workers + 1) > 64:
            raise ValueError(f"{nodes} nodes of {workers} workers: at most 8 nodes, and 64 workers and nodes together")
        if keys < 1 or registers < 0 or keys + registers > 64:
            raise ValueError(f"{keys} keys and {registers} registers: at least one key, at most 64 in all")
        if not 0 <= ops <= 1 << 20:
            raise ValueError(f"ops {ops}: must be in [0, 2**20]")
        if not 1 <= positions <= 80:
            raise ValueError(f"positions {positions}: must be in [1, 80]")
        for name, value, known in (("mode", mode, tuple(MODES)), ("lengths", lengths, (*LENGTHS, "large")),
                                   ("sampling", sampling, SAMPLING)):
            if value not in known:
                raise ValueError(f"{name} {value!r}: expected one of {', '.join(known)}")
        self.settings = {"nodes": nodes, "workers": workers, "keys": keys, "ops": ops, "mode": mode, "caches": caches,
                         "shared_memory": shared_memory, "faults": fault_bits(faults), "registers": registers, "lengths": lengths,
                         "sampling": sampling, "positions": positions}
        self.seed, self.max_turns, self.actors = seed, max_turns, actors
        actors_of(actors)               # are there any of that kind?

    def run(self) -> Result:
        """Run the schedule to its end. Raises Violation, with the seed and a trace."""
        schedule = self._schedule()
        if schedule.run():
            self._raise(schedule)
        self._check_history(schedule)
        turns, switches, messages, trace_hash = schedule.figures()
        return Result(self.seed, turns, switches, messages, schedule.operations, schedule.relocations, trace_hash)

    def _schedule(self):
        settings = self.settings
        return Schedule(self.seed, nodes=settings["nodes"], workers=settings["workers"], keys=settings["keys"],
                        registers=settings["registers"], ops=settings["ops"], waits=MODES[settings["mode"]],
                        caches=settings["caches"], shared_memory=settings["shared_memory"],
                        mixed_lengths=settings["lengths"] != "uniform", faults=settings["faults"] % NETWORK,
                        network=settings["faults"] // NETWORK * NETWORK, max_steps=self.max_turns,
                        sampling=settings["sampling"], actors=self.actors, positions=settings["positions"],
                        extra=LARGE if settings["lengths"] == "large" else 0)

    def _raise(self, schedule) -> NoReturn:
        problem, key = self._describe(schedule)
        raise Violation(problem, key, self._trace(schedule, key), self.seed, self.command(), self.settings)

    def _check_history(self, schedule) -> None:
        reads, seen, writes, accesses = schedule.history()
        for finding in check(History(reads, seen, writes)) or check_registers(accesses):
            who = f" (worker {finding.worker} is {self._actor(self.settings['nodes'] + finding.worker)})" if finding.worker >= 0 else ""
            raise Violation(finding.text + who, finding.key, self._trace(schedule, finding.key, finding), self.seed, self.command(),
                            self.settings)

    def command(self) -> str:
        """The command that replays this schedule."""
        return "python -m lapse.testing --schedules 1 " + " ".join(options_of(self.seed, self.settings))

    def _describe(self, schedule) -> tuple[str, int]:
        problem, actor, key, a, b = schedule.problem()
        text = _PROBLEMS[problem].format(actor=self._actor(actor), key=key, a=a, b=b, violation=VIOLATIONS.get(a, f"code {a}"))
        if problem == 2:
            text += "".join(f"; {self._actor(who)} {self._wait(state, channel, holder)}"
                            for who, state, channel, holder in schedule.waiting() if state in (1, 3))
        return text, key

    def _wait(self, state: int, channel: int, holder: int) -> str:
        if state == 3:
            return "sleeps"
        text = f"waits for the channel to node {channel % self.settings['nodes']}"
        return f"{text}, which {self._actor(holder)} has" if holder >= 0 else text

    def _actor(self, actor: int) -> str:
        nodes, workers = self.settings["nodes"], self.settings["workers"]
        if actor < 0:
            return "the audit"
        if actor < nodes:
            return f"node {actor} server"
        return f"node {(actor - nodes) // workers} worker {(actor - nodes) % workers}"

    def _trace(self, schedule, key: int, finding=None, about: int = 60, last: int = 10) -> list[str]:
        """The last events about the key, and the very last ones about any; nothing after the call that a finding is about."""
        events = list(schedule.events())
        if finding is not None and finding.worker >= 0:
            actor = self.settings["nodes"] + finding.worker
            ends = [i for i, event in enumerate(events) if event[1] == actor and event[2] == 1 and event[4] == finding.order]
            events = events[:ends[0] + 1] if ends else events
        chosen = set(range(max(0, len(events) - last), len(events)))
        concerned = (i for i in range(len(events) - 1, -1, -1) if key < 0 or key in events[i][12])
        chosen.update(islice(concerned, about))
        return [self._line(events[i]) for i in sorted(chosen)]

    def _line(self, event) -> str:
        step, actor, what, kind, order, ts, src, dst, origin, worker, hops, n, keys, aux = event
        names = ", ".join(map(str, keys)) + (", ..." if n > len(keys) else "")
        text = f"{step:6} {self._actor(actor):15} {_VERBS[what]} "
        if what < 2:
            return text + f"its call {order}: {_CALLS[kind]} of {names}" + (f" (ts {ts})" if what == 1 and ts >= 0 else "")
        text += f"{_MESSAGES.get(kind, kind)} of {names} {'from' if what == 3 else 'to'} node {src if what == 3 else dst} (number {order}"
        if kind in (5, 6):
            text += f", epoch {', '.join(map(str, aux))}"
        if kind != 6:
            text += f", for node {origin} worker {worker} ts {ts}"
        return text + (f", hop {hops})" if hops else ")")


class Cluster(Simulation):
    """The same cluster, driven from outside step by step: who does what next is the caller's choice. For stateful tests.

    The arguments are the Simulation's; ops is how many operations a worker may issue in all, mode and sampling mean nothing, and of the
    network's faults there are "loss" and "duplicate". No step is interrupted by another. Each method raises Violation when something
    is wrong. One thread; local.
    """

    def __init__(self, nodes: int = 2, workers: int = 1, keys: int = 2, *, ops: int = 200, seed: int = 0, **settings):
        super().__init__(seed, nodes, workers, keys, ops, **settings)
        self.schedule = self._schedule()
        self.schedule.begin_steps()
        self.registers = self.schedule.registers()          # the keys that are set; the others are added to

    def issue(self, node: int, worker: int, kind: str, keys: list[int]) -> bool:
        """Let a worker pull, push, set or localize; False if it has too much under way."""
        numbers = {name: number for number, name in _CALLS.items()}
        if kind not in numbers or not 1 <= len(keys) <= 80:
            raise ValueError(f"{kind!r} of {len(keys)} keys: expected one of {', '.join(numbers)}, of 1 to 80 keys")
        for key in keys:
            if not 0 <= key < self.settings["keys"] + self.settings["registers"]:
                raise ValueError(f"key {key}: there is none")
            if kind in ("push", "set") and (key in self.registers) != (kind == "set"):
                raise ValueError(f"{kind} of key {key}: registers are set, other keys are pushed to")
        return self._step(self.schedule.issue, node, worker, numbers[kind], keys)

    def waiting(self) -> list[tuple[int, int]]:
        """The channels that have messages: (source, destination)."""
        return self.schedule.waiting_channels()

    def deliver(self, source: int, destination: int) -> bool:
        """Let a node handle the oldest message of a channel; False if there is none."""
        return self._step(self.schedule.deliver, source, destination)

    def collect(self, node: int, worker: int) -> int:
        """Let a worker see which of its operations have finished; how many have not."""
        return self._step(self.schedule.collect, node, worker)

    def check(self) -> None:
        """Does the history so far keep the promise?"""
        self._check_history(self.schedule)

    def rest(self) -> None:
        """Deliver all there is; then everything has to be finished, and totals, directories and history have to agree."""
        self._step(self.schedule.end_steps)
        self.check()

    def command(self) -> str:
        return "(the steps that a test has chosen)"

    def _step(self, function, *args):
        result = function(*args)
        if self.schedule.problem()[0]:
            self._raise(self.schedule)
        return result


def fault_bits(faults: int | str | Iterable[str]) -> int:
    """The bits of faults given by name."""
    if isinstance(faults, int):
        return faults
    bits = 0
    for name in (faults.split(",") if isinstance(faults, str) else faults):
        if name not in FAULTS:
            raise ValueError(f"fault {name!r}: expected one of {', '.join(FAULTS)}")
        bits |= FAULTS[name]
    return bits


def options_of(seed: int, settings: dict) -> list[str]:
    """The options of `python -m lapse.testing` for these settings."""
    options = [f"--seed {seed}"]
    for name, value in settings.items():
        if name == "faults":
            options += [f"--fault {fault}" for fault, bit in FAULTS.items() if value & bit]
        else:
            value = ("on" if value else "off") if isinstance(value, bool) else value
            options.append(f"--{name.replace('_', '-')} {value}")
    return options
