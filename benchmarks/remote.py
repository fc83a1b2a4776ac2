"""What crosses the network, between 2 or 3 real nodes: latencies against a raw echo, throughputs against raw request-reply.

Every node runs `Plan.run`, the same steps in the same order, with barriers between them: node 0 measures, the others do their part or
wait. The raw side runs in the very same threads and processes over sockets of its own, round by round in turn with Lapse. Its form is
the faster one of PUSH/PULL (a socket per direction, as Lapse has it) and a pair of DEALERs.
"""
from __future__ import annotations

import functools
import tempfile
import threading
from pathlib import Path

import numpy as np
import zmq

import lapse
from benchmarks import _loops
from benchmarks.report import Row, against, against_cpp, progress

LENGTH = 100
FORMS = ("push/pull", "dealer")
HEADER, KEY, AUX, VALUE = 64, 8, 4, 4 * LENGTH      # bytes; see lapse/_wire.pxd


def frame(keys: int, values: bool) -> int:
    return HEADER + keys * KEY + (keys * AUX + 7) // 8 * 8 + values * keys * VALUE


class RawSockets:
    """A node's raw sockets, to and from one other node."""

    def __init__(self, rank: int, peer: int, transport: str, folder: str, barrier):
        self.context = zmq.Context()
        self.into, self.out = {}, {}
        for form, kind in zip(FORMS, (zmq.PULL, zmq.DEALER), strict=True):
            self.into[form] = self.socket(kind)
            if form == "dealer" and rank > peer:
                continue                                    # one of the two connects
            self.into[form].bind("tcp://127.0.0.1:*" if transport == "tcp" else f"ipc://{self.path(folder, form, rank)}")
            endpoint = self.into[form].getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode()
            Path(self.path(folder, form, rank) + ".at").write_text(endpoint)
        barrier()
        for form in FORMS:
            self.out[form] = self.into[form] if form == "dealer" else self.socket(zmq.PUSH)
            if form != "dealer" or rank > peer:
                self.out[form].connect(Path(self.path(folder, form, peer) + ".at").read_text())

    def socket(self, kind: int) -> zmq.Socket:
        socket = self.context.socket(kind)
        socket.set_hwm(0)
        socket.setsockopt(zmq.LINGER, 0)
        return socket

    @staticmethod
    def path(folder: str, form: str, rank: int) -> str:
        return f"{folder}/{form[0]}{rank}"

    def close(self) -> None:
        self.context.destroy(0)


class Plan:
    """The steps of one node. Keys of node r: [r * per_home, (r + 1) * per_home)."""

    def __init__(self, worker: lapse.Worker, nodes: int, transport: str, folder: str, size: dict):
        self.worker, self.nodes, self.transport, self.size = worker, nodes, transport, size
        self.per_home = -(-worker.num_keys // nodes)
        self.rank = int(np.flatnonzero(worker.is_local(np.arange(nodes) * self.per_home))[0])
        self.raw = RawSockets(self.rank, 1 - self.rank, transport, folder, worker.barrier) if self.rank < 2 else worker.barrier()
        self.random = np.random.default_rng(1)                      # the same numbers on every node
        self.figures: dict[str, list[float]] = {}
        mine = np.arange(self.rank * self.per_home, min((self.rank + 1) * self.per_home, worker.num_keys))
        for keys in np.array_split(mine, -(-len(mine) // 10000)):
            worker.set(keys, np.ones((len(keys), LENGTH), np.float32))      # every row is held
        worker.barrier()

    def close(self) -> None:
        self.worker.barrier()
        if self.raw is not None:
            self.raw.close()

    def note(self, name: str, value: float) -> None:
        self.figures.setdefault(name, []).append(value)

    def keys_of(self, rank: int, shape) -> np.ndarray:
        """Different keys of one home."""
        count = int(np.prod(shape))
        chosen = self.random.permutation(self.per_home - self.nodes)[:count]
        if len(chosen) < count:
            raise ValueError(f"{count} of {self.per_home} keys")
        return (rank * self.per_home + chosen).reshape(shape)

    # -- sides: each is run by all nodes, and noted by node 0

    def echo(self, request: int, reply: int, calls: int, name: str) -> None:
        """The median time of a raw round trip, for each form."""
        for form in FORMS:
            self.worker.barrier()
            if self.rank == 0:
                times = np.empty(calls, np.int64)
                _loops.raw_client(self.raw.out[form], self.raw.into[form], request, calls, 1, times)
                self.note(f"{name} {form}", float(np.median(times)) / 1e3)
            elif self.rank == 1:
                _loops.raw_server(self.raw.into[form], self.raw.out[form], reply, calls)

    def handed_echo(self, request: int, reply: int, calls: int) -> None:
        """The same with a thread that receives for node 0 and wakes it, as Lapse's server thread does (push/pull)."""
        self.worker.barrier()
        if self.rank == 0:
            box, times = _loops.Mailbox(), np.empty(calls, np.int64)
            receiver = threading.Thread(target=_loops.raw_receiver, args=(self.raw.into["push/pull"], box, calls))
            receiver.start()
            _loops.raw_sender(self.raw.out["push/pull"], box, request, times)
            receiver.join()
            self.note("handed echo", float(np.median(times)) / 1e3)
        elif self.rank == 1:
            _loops.raw_server(self.raw.into["push/pull"], self.raw.out["push/pull"], reply, calls)

    def exchange(self, request: int, reply: int, calls: int, window: int, keys_per_call: int, name: str) -> None:
        """Million keys/s of a raw request-reply, for each form."""
        for form in FORMS:
            self.worker.barrier()
            if self.rank == 0:
                took = _loops.raw_client(self.raw.out[form], self.raw.into[form], request, calls, window)
                self.note(f"{name} {form}", 1e3 * calls * keys_per_call / took)
            elif self.rank == 1:
                _loops.raw_server(self.raw.into[form], self.raw.out[form], reply, calls)

    def pull(self, calls: int) -> None:
        keys = self.keys_of(1, calls)
        self.worker.barrier()
        if self.rank == 0:
            times = np.empty(calls, np.int64)
            _loops.pull_times(self.worker, keys, np.empty(LENGTH, np.float32), times)
            self.note("pull", float(np.median(times)) / 1e3)
            self.note("pull p99", float(np.percentile(times, 99)) / 1e3)

    def in_flight(self, push: bool, calls: int, window: int, keys_per_call: int) -> None:
        """Calls of 100 keys; no key twice in a call."""
        start = self.random.integers(0, self.per_home - keys_per_call * 97 - self.nodes, calls)
        keys = self.per_home + start[:, None] + np.arange(keys_per_call) * self.random.integers(1, 97, calls)[:, None]
        self.worker.barrier()
        if self.rank == 0:
            vals = np.zeros((window, keys_per_call * LENGTH), np.float32)
            took = _loops.calls_in_flight(self.worker, push, keys, vals)
            self.note("push in flight" if push else "pull in flight", 1e3 * calls * keys_per_call / took)

    def localize(self, calls: int, home: int) -> None:
        """Localize keys that node 1 owns, one after the other; then node 1 takes them back."""
        keys = self.keys_of(home, calls)
        if home != 1 and self.rank == 1:
            self.worker.localize(keys)
        self.worker.barrier()
        if self.rank == 0:
            times = np.empty(calls, np.int64)
            _loops.localize_times(self.worker, keys, times)
            self.note("localize", float(np.median(times)) / 1e3)
            self.note("localize p99", float(np.percentile(times, 99)) / 1e3)
        self.worker.barrier()
        if self.rank == home:
            self.worker.localize(keys)

    def localize_pipelined(self, calls: int, keys_per_call: int) -> None:
        """Localize keys homed at node 1, all calls under way at once; then node 1 takes them back."""
        keys = self.keys_of(1, (calls, keys_per_call))
        self.worker.barrier()
        if self.rank == 0:
            took = _loops.localize_pipelined(self.worker, keys)
            self.note("localize pipelined", 1e3 * keys.size / took)
        self.worker.barrier()
        if self.rank == 1:
            _loops.localize_pipelined(self.worker, keys)

    # -- what runs

    def rounds(self, number_of_rounds: int, name: str, *sides) -> None:
        """All sides in turn, round by round; the first round only warms up."""
        if self.rank == 0:
            progress(f"remote, {self.transport}, {self.nodes} nodes: {name}")
        before = dict(self.figures)
        for number in range(number_of_rounds + 1):
            for side in sides:
                side()
            if number == 0:
                self.figures = dict(before)

    def run_two(self) -> None:
        size, part = self.size, functools.partial
        calls, window, per_call, batch = size["calls"], size["window"], size["keys_per_call"], size["batch"]
        flights, batches, short, long = size["flights"], size["batches"], size["short_rounds"], size["rounds"]
        self.rounds(short, "synchronous pull", part(self.pull, calls), part(self.echo, frame(1, False), frame(1, True), calls, "echo"),
                    part(self.handed_echo, frame(1, False), frame(1, True), calls))
        self.rounds(short, "localize", part(self.localize, calls, 1),
                    part(self.echo, frame(1, False), frame(1, True), calls, "echo of localize"))
        self.rounds(long, "pulls in flight", part(self.in_flight, False, flights, window, per_call),
                    part(self.exchange, frame(per_call, False), frame(per_call, True), flights, window, per_call, "raw pull"))
        self.rounds(long, "pushes in flight", part(self.in_flight, True, flights, window, per_call),
                    part(self.exchange, frame(per_call, True), frame(per_call, False), flights, window, per_call, "raw push"))
        self.rounds(long, "localize, pipelined", part(self.localize_pipelined, batches, batch),
                    part(self.exchange, frame(batch, False), frame(batch, True), batches, batches, batch, "raw localize"))

    def run_three(self) -> None:
        calls = self.size["calls"]
        self.rounds(self.size["short_rounds"], "localize with home and owner apart", functools.partial(self.localize, calls, 2),
                    functools.partial(self.echo, frame(1, False), frame(1, True), calls, "echo of localize"))


def run_node(worker: lapse.Worker, nodes: int, transport: str, folder: str, size: dict) -> dict[str, list[float]]:
    plan = Plan(worker, nodes, transport, folder, size)
    plan.run_two() if nodes == 2 else plan.run_three()
    plan.close()
    return plan.figures


def measure(nodes: int, transport: str, size: dict) -> dict[str, list[float]]:
    """Figures by name, one per round: microseconds, or million keys/s."""
    with tempfile.TemporaryDirectory(prefix="lapse-") as folder:
        results = lapse.launch(run_node, nodes, 1, num_keys=size["num_keys"], value_length=LENGTH, transport=transport,
                               args=(nodes, transport, folder, size))
    return results[0][0]


def faster(figures: dict[str, list[float]], name: str, pick=max) -> tuple[str, list[float]]:
    """The raw form that is better in the median, and what it reached."""
    form = pick(FORMS, key=lambda form: np.median(figures[f"{name} {form}"]))
    return f"raw {form}", figures[f"{name} {form}"]


def sizes(quick: bool) -> dict:
    """Latencies are taken in many short rounds: they depend on where the threads happen to run, which changes within a second."""
    return {"num_keys": 100_000, "rounds": 5 if quick else 21, "short_rounds": 15 if quick else 75, "calls": 200,
            "flights": 500 if quick else 2000, "window": 64, "keys_per_call": 100, "batches": 45, "batch": 1000}


def run(quick: bool = False, size: dict | None = None) -> list[Row]:
    size = size or sizes(quick)
    rows = []
    for transport in ("tcp", "ipc"):
        two = measure(2, transport, size)
        three = measure(3, transport, size)
        echo = faster(two, "echo", min)
        echo_two, echo_three = faster(two, "echo of localize", min), faster(three, "echo of localize", min)
        rows += [
            against(f"synchronous remote pull of 1 key, {transport}", two["pull"], "us", *echo, "<= 1.25", "51-187 us"),
            against(f"echo whose answers another thread receives, {transport}", two["handed echo"], "us", *echo),
            against(f"remote pull, 64 x 100 in flight, {transport}", two["pull in flight"], "M keys/s", *faster(two, "raw pull"), ">= 0.6"),
            against(f"remote push, 64 x 100 in flight, {transport}", two["push in flight"], "M keys/s", *faster(two, "raw push"), ">= 0.6"),
            against(f"localize 1 key, 2 nodes, {transport}", two["localize"], "us", *echo_two, "<= 1.4", "99-213 us"),
            against(f"localize 1 key, 3 distinct nodes, {transport}", three["localize"], "us", *echo_three, "<= 1.9"),
            against(f"localize, pipelined by 1,000, {transport}", two["localize pipelined"], "M keys/s", *faster(two, "raw localize")),
        ]
        if transport == "tcp":
            rows += [
                against_cpp("remote pull, 64 x 100 in flight, tcp", two["pull in flight"], "M keys/s", 2.09, "> 1.5", "1.87-2.09 M"),
                against_cpp("remote push, 64 x 100 in flight, tcp", two["push in flight"], "M keys/s", 1.59, "> 1.5", "1.42-1.59 M"),
                against_cpp("localize, pipelined by 1,000, tcp", two["localize pipelined"], "M keys/s", 1.60, "> 1.5", "1.60 M"),
            ]
    return rows
