"""What encryption costs: jobs of two nodes over tcp on this host, one with CURVE and one with the token, measured in turn.

The two jobs exist at the same time, and one waits while the other one is measured. Without encryption means PLAIN here, which is what a job
on one host uses; it costs nothing once a connection stands.
"""
from __future__ import annotations

import multiprocessing
import tempfile

import lapse
from benchmarks.remote import LENGTH, Plan
from benchmarks.report import Row, against, progress

MODES = ("token", "curve")
PIECES = (1, 100, 300)          # keys per call, in flight


def in_flight(plan: Plan, push: bool, calls: int, window: int, keys_per_call: int) -> None:
    name = "push in flight" if push else "pull in flight"
    plan.in_flight(push, calls, window, keys_per_call)
    if plan.rank == 0:
        plan.note(f"{name} {keys_per_call}", plan.figures[name].pop())


def run_node(worker: lapse.Worker, mode: str, folder: str, size: dict, meeting) -> dict[str, list[float]]:
    plan = Plan(worker, 2, "tcp", folder, size)
    for number in range(size["rounds"] + 1):
        for turn in MODES[::1 if number % 2 else -1]:
            if turn == mode:
                if plan.rank == 0:
                    progress(f"security: round {number}, {mode}") if number % 10 == 0 else None
                plan.pull(size["calls"])
                plan.localize(size["calls"], 1)
                for keys_per_call in PIECES:
                    for push in (False, True):
                        in_flight(plan, push, size["flights"], size["window"], keys_per_call)
            worker.barrier()
            if plan.rank == 0:
                meeting.wait(600)
            worker.barrier()
        if number == 0:                 # that was to warm up
            plan.figures.clear()
    plan.close()
    return plan.figures


def run_job(mode: str, size: dict, meeting, answer) -> None:
    try:
        with tempfile.TemporaryDirectory(prefix="lapse-") as folder:
            results = lapse.launch(run_node, 2, 1, num_keys=size["num_keys"], value_length=LENGTH, transport="tcp", security=mode,
                                   args=(mode, folder, size, meeting))
        answer.send(results[0][0])
    except BaseException:
        meeting.abort()
        raise


def measure(size: dict) -> dict[str, dict[str, list[float]]]:
    """Figures by mode and name, one per round: microseconds, or million keys/s."""
    context = multiprocessing.get_context("fork")
    meeting = context.Barrier(len(MODES))
    figures, jobs = {}, {}
    for mode in MODES:
        into, out = context.Pipe(duplex=False)
        jobs[mode] = context.Process(target=run_job, args=(mode, size, meeting, out), name=f"job with {mode}"), into
        jobs[mode][0].start()
        out.close()
    try:
        for mode, (_, into) in jobs.items():
            figures[mode] = into.recv()
    finally:
        for process, _ in jobs.values():
            process.join()
    return figures


def sizes(quick: bool) -> dict:
    return {"num_keys": 100_000, "rounds": 7 if quick else 31, "calls": 200, "flights": 200, "window": 32}


def run(quick: bool = False, size: dict | None = None) -> list[Row]:
    figures = measure(size or sizes(quick))
    curve, token = figures["curve"], figures["token"]
    rows = [against("synchronous remote pull of 1 key, tcp, encrypted", curve["pull"], "us", "token", token["pull"]),
            against("localize 1 key, 2 nodes, tcp, encrypted", curve["localize"], "us", "token", token["localize"])]
    for keys in PIECES:
        for what in ("pull", "push"):
            name = f"{what} in flight {keys}"
            rows.append(against(f"remote {what}, 32 x {keys} keys in flight, tcp, encrypted", curve[name], "M keys/s", "token", token[name],
                                note=f"{4 * LENGTH * keys / 1000:g} kB of values a message"))
    return rows
