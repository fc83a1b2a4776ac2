"""`python -m lapse.testing`: run schedules of the simulation. Exit code 0: no violation; 1: one was found, and is printed.

`python -m lapse.testing faults`: put in each fault, and print the table of what was found; 1: one was not.
"""
import argparse
import subprocess
import sys
import time
from pathlib import Path

from lapse.testing import campaign
from lapse.testing.actors import KINDS, actors_of
from lapse.testing.simulation import FAULTS, LENGTHS, MODES, SAMPLING, fault_bits


def switch(text: str) -> bool:
    if text not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected on or off")
    return text == "on"


def natural(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be positive")
    return value


def seed_range(text: str) -> range:
    first, _, last = text.partition("-")
    if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last) < 2**64):
        raise argparse.ArgumentTypeError(f"{text!r}: expected FIRST-LAST, two numbers below 2**64")
    return range(int(first), int(last) + 1)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m lapse.testing", description="Run schedules of simulated clusters and check each. "
                                "What is not given takes all its values in turn.")
    p.add_argument("--schedules", type=natural, default=20_000, help="how many (default: %(default)s)")
    p.add_argument("--seed", type=int, default=1, help="of the first one; the others count up (default: %(default)s)")
    p.add_argument("--seeds", type=seed_range, metavar="FIRST-LAST", help="instead of both: a range, after which its record is printed")
    p.add_argument("--mode", choices=MODES, help="which operations are waited for at once: all, half, none")
    p.add_argument("--nodes", type=natural)
    p.add_argument("--workers", type=natural, help="per node")
    p.add_argument("--keys", type=natural, help="that are pulled and pushed")
    p.add_argument("--registers", type=int, default=1, help="keys that are pulled and set (default: %(default)s)")
    p.add_argument("--ops", type=natural, default=12, help="operations per worker (default: %(default)s)")
    p.add_argument("--caches", type=switch, metavar="on|off", help="location caches")
    p.add_argument("--shared-memory", type=switch, metavar="on|off", help="workers reach local keys directly")
    p.add_argument("--lengths", choices=(*LENGTHS, "large"), help="of the values; large: two fill a message")
    p.add_argument("--positions", type=natural, default=6, help="keys of one call, at most (default: %(default)s)")
    p.add_argument("--sampling", choices=SAMPLING, help="the scheme that draws the keys of half of the pulls")
    p.add_argument("--fault", action="append", choices=FAULTS, default=[], help="a bug that the tests are to find; repeatable")
    p.add_argument("--actors", choices=KINDS, help="what runs nodes and workers: threads do the same, slowly, and without greenlet")
    p.add_argument("--processes", type=natural, default=1, help="(default: %(default)s)")
    return p


def one(value):
    return None if value is None else [value]


def commit() -> str:
    """The commit of the tree that Lapse was loaded from, with a mark if something in it was changed since."""
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"], cwd=Path(__file__).parent,
                              capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def faults_table(argv) -> int:
    """Every fault alone, over all settings: how many schedules it takes to find it, and what finds it."""
    p = argparse.ArgumentParser(prog="python -m lapse.testing faults", description="Put each fault into the simulation, one at a time.")
    p.add_argument("--schedules", type=natural, default=1000, help="in which each has to be found (default: %(default)s)")
    args = p.parse_args(argv)
    settings = campaign.configurations()
    missed = 0
    print(f"{'fault':22} {'schedules':>9}  found as")
    for fault in (*(name for name in FAULTS if name != "no_sequence"), "loss,no_sequence", "duplicate,no_sequence", "reorder,no_sequence"):
        found = campaign.faulty(fault, args.schedules, settings)
        missed += found is None
        print(f"{fault:22} {found[0] if found else 'none':>9}  {found[1].problem if found else 'NOT FOUND'}", flush=True)
    if missed:
        print(f"{missed} faults were not found in {args.schedules} schedules each", file=sys.stderr)
    return 1 if missed else 0


def main(argv=None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv) if argv[:1] != ["faults"] else None
    try:
        actors_of(args and args.actors)
    except ModuleNotFoundError as missing:
        print(f"python -m lapse.testing: {missing}", file=sys.stderr)
        return 2
    if args is None:
        return faults_table(argv[1:])
    if args.seeds is not None:
        args.seed, args.schedules = args.seeds[0], len(args.seeds)
    fixed = {"registers": args.registers, "ops": args.ops, "positions": args.positions, "faults": fault_bits(args.fault),
             "actors": args.actors}
    settings = [{**chosen, **fixed} for chosen in campaign.configurations(
        nodes=one(args.nodes), workers=one(args.workers), modes=one(args.mode), caches=one(args.caches),
        shared_memory=one(args.shared_memory), lengths=one(args.lengths), sampling=one(args.sampling), keys=one(args.keys))]
    start = time.monotonic()

    def line(tally) -> str:
        seconds = time.monotonic() - start
        return (f"{tally.schedules} of {args.schedules} schedules, {tally.operations} operations, {tally.messages} messages, "
                f"{tally.relocations} relocations, {tally.turns} turns, {seconds:.0f} s")

    def progress(tally) -> None:
        print("\r" + line(tally), end="", file=sys.stderr, flush=True)

    terminal = sys.stderr.isatty()
    tally = campaign.run(args.seed, args.schedules, settings, processes=args.processes, progress=progress if terminal else None)
    if terminal:
        print(file=sys.stderr)
    print(f"{line(tally)}: {'a violation' if tally.violation else 'no violation'}")
    if tally.violation:
        print(f"seed {tally.violation.seed}: {tally.violation}")
        least = campaign.shrink(tally.violation)
        print(f"Shrunk: {least.problem}\nAs a test:\n\n{campaign.as_test(least)}")
        return 1
    if args.seeds is not None:
        print(f"commit {commit()}, seeds {args.seed}-{args.seed + args.schedules - 1}, trace hash {tally.trace_hash:016x}, "
              f"{tally.schedules / (time.monotonic() - start):.0f} schedules/s, 0 violations")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("python -m lapse.testing: interrupted", file=sys.stderr)
        sys.exit(130)
