"""`python -m lapse.testing`: run schedules of the simulation. Exit code 0: no violation; 1: one was found, and is printed."""
import argparse
import sys
import time

from lapse.testing import campaign
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


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m lapse.testing", description="Run schedules of simulated clusters and check each. "
                                "What is not given takes all its values in turn.")
    p.add_argument("--schedules", type=natural, default=20_000, help="how many (default: %(default)s)")
    p.add_argument("--seed", type=int, default=1, help="of the first one; the others count up (default: %(default)s)")
    p.add_argument("--mode", choices=MODES, help="which operations are waited for at once: all, half, none")
    p.add_argument("--nodes", type=natural)
    p.add_argument("--workers", type=natural, help="per node")
    p.add_argument("--keys", type=natural, default=3, help="that are pulled and pushed (default: %(default)s)")
    p.add_argument("--registers", type=int, default=1, help="keys that are pulled and set (default: %(default)s)")
    p.add_argument("--ops", type=natural, default=12, help="operations per worker (default: %(default)s)")
    p.add_argument("--caches", type=switch, metavar="on|off", help="location caches")
    p.add_argument("--shared-memory", type=switch, metavar="on|off", help="workers reach local keys directly")
    p.add_argument("--lengths", choices=LENGTHS, help="of the values")
    p.add_argument("--sampling", choices=SAMPLING, help="the scheme that draws the keys of half of the pulls")
    p.add_argument("--fault", action="append", choices=FAULTS, default=[], help="a bug that the tests are to find; repeatable")
    p.add_argument("--processes", type=natural, default=1, help="(default: %(default)s)")
    return p


def one(value):
    return None if value is None else [value]


def main(argv=None) -> int:
    args = parser().parse_args(argv)
    fixed = {"keys": args.keys, "registers": args.registers, "ops": args.ops, "faults": fault_bits(args.fault)}
    settings = [{**chosen, **fixed} for chosen in campaign.configurations(
        nodes=one(args.nodes), workers=one(args.workers), modes=one(args.mode), caches=one(args.caches),
        shared_memory=one(args.shared_memory), lengths=one(args.lengths), sampling=one(args.sampling))]
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
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
