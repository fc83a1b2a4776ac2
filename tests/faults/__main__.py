"""Disturb real jobs at random instants, and look at how they end: `make faults`.

Each run is a job of 2 to 4 nodes over ipc or tcp, drawn from its seed like the instant. Whatever is done to it: all processes have to end
within 5 s after one was killed, within 6 s after one was frozen or a connection was cut; exit codes are not 0; the message names the node
(and the signal); no process, no file, no socket is left. The table at the end is the record; exit code 1 if any outcome was wrong.

    make faults                                             everything, about 40 minutes
    make faults ARGS="--scale 0.1"                          a tenth
    make faults ARGS="--only kill-storm --seed 7 --runs 1"  that one again

The limits hold on a machine that is not overloaded; --patience 3 makes them three times as long.
"""
import argparse
import fnmatch
import os
import statistics
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from running import run_healthy
from scenarios import SCENARIOS, Scenario
from soak import commit

ATTEMPTS = 30           # until the fault falls into its phase


def parse(argv):
    parser = argparse.ArgumentParser(prog="faults", description="Disturb real jobs at random instants, and look at how they end.")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="scenarios to run (* matches anything); repeatable")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of runs (default: 1, the full campaign)")
    parser.add_argument("--runs", type=int, default=None, metavar="N", help="of each scenario, whatever the scale")
    parser.add_argument("--seed", type=int, default=1, help="of the first run of each scenario; the others count up (default: 1)")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="at once (default: 2)")
    parser.add_argument("--patience", type=float, default=1.0, metavar="X", help="factor for the limits of 5 and 6 s (default: 1)")
    parser.add_argument("--list", action="store_true", help="list the scenarios, and run none")
    return parser.parse_args(argv)


@dataclass
class Row:
    scenario: Scenario
    seconds: list = field(default_factory=list)
    missed: int = 0
    wrong: int = 0
    notes: Counter = field(default_factory=Counter)


class Campaign:
    def __init__(self, args, scenarios):
        self.args, self.scenarios = args, scenarios
        self.rows = {scenario.name: Row(scenario) for scenario in scenarios}
        self.lock = threading.Lock()
        self.done = 0
        self.typical = {}

    def measure(self):
        """How long the phases take in which no job waits."""
        probe = Scenario("healthy", 1, "", ("end",), None)
        if not any(scenario.phases for scenario in self.scenarios):
            return
        found = [run_healthy(probe, seed) for seed in range(3)]
        self.typical = {phase: statistics.median(times[phase] for times in found) for phase in found[0]}

    def one(self, scenario, seed):
        limit = scenario.seconds * self.args.patience
        for attempt in range(ATTEMPTS):
            outcome = scenario.run(scenario, seed, attempt, self.typical)
            if outcome.seconds > limit:
                outcome.wrong.append(f"it took {outcome.seconds:.2f} s, not {limit:g} s")
            if outcome.wrong or not outcome.missed:     # in whatever phase: nothing may hang, nothing be left
                break
            with self.lock:
                self.rows[scenario.name].missed += 1
        else:
            outcome.wrong.append("the fault never fell into its phase")
        with self.lock:
            row = self.rows[scenario.name]
            row.seconds.append(outcome.seconds)
            row.wrong += bool(outcome.wrong)
            row.notes[outcome.note] += 1
            self.done += 1
            if outcome.wrong:
                print(f"WRONG: {'; '.join(outcome.wrong)}\n  again: make faults ARGS=\"--only {scenario.name} --seed {seed} --runs 1\"\n"
                      + "".join(f"    {line}\n" for line in outcome.text.splitlines()[:60]), flush=True)

    def run(self):
        self.measure()
        work = []
        for scenario in self.scenarios:
            runs = self.args.runs or max(1, round(scenario.runs * self.args.scale))
            work += [(scenario, self.args.seed + i) for i in range(runs)]
        pool = ThreadPoolExecutor(self.args.jobs)
        try:
            for future in [pool.submit(self.one, *entry) for entry in work]:
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)      # after Ctrl-C, the jobs that are under way come to their end

    def table(self):
        lines = ["| scenario | runs | wrong | missed the phase | median s | worst s | limit s |", "|---|---|---|---|---|---|---|"]
        for row in self.rows.values():
            numbers = [len(row.seconds), row.wrong, row.missed, f"{statistics.median(row.seconds):.2f}", f"{max(row.seconds):.2f}",
                       f"{row.scenario.seconds * self.args.patience:g}"]
            lines.append(f"| {row.scenario.name} | {' | '.join(map(str, numbers))} |")
        for row in self.rows.values():
            lines += [f"{row.scenario.name}: {count} x {note}" for note, count in sorted(row.notes.items()) if note]
        return "\n".join(lines)


def main(argv=None):
    args = parse(argv)
    scenarios = [replace(scenario, scale=args.scale) for scenario in SCENARIOS
                 if not args.only or any(fnmatch.fnmatch(scenario.name, pattern) for pattern in args.only)]
    if not scenarios:
        print(f"faults: no scenario is called {' or '.join(args.only)}; there are:", file=sys.stderr)
    if args.list or not scenarios:
        print("\n".join(f"{scenario.name}: {scenario.runs}" for scenario in SCENARIOS))
        return 0 if args.list else 2
    start = time.monotonic()
    campaign = Campaign(args, scenarios)
    campaign.run()
    wrong = sum(row.wrong for row in campaign.rows.values())
    print(campaign.table())
    print(f"faults: commit {commit()}, seed {args.seed}, {campaign.done} jobs disturbed, {wrong} outcomes wrong, "
          f"{(time.monotonic() - start) / 60:.1f} min, {os.cpu_count()} cores")
    return 1 if wrong else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("faults: interrupted", file=sys.stderr)
        sys.exit(130)
