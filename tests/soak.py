"""Histories of real clusters for a long time, checked for per-key sequential consistency: `make soak`.

Job after job of tests/cluster/test_consistency.py, on 2 to 4 nodes, in the configurations below in turn, each with a seed of its own,
until the time is over or enough keys have been read. The last lines are the record. Exit code 1 if a job found a violation, or did not
end well.

    make soak                                   half an hour
    make soak ARGS="--pulls 100000000"          until so many keys have been read
    make soak ARGS="--fault split_route"        with the bug of the C++ original put in: this has to fail
"""
import argparse
import os
import re
import subprocess
import sys
import time
from collections import Counter
from itertools import product
from pathlib import Path

from launched import ROOT, Jobs

PROGRAM = "tests/cluster/test_consistency.py"
DEADLINE = 600          # seconds for a job
# What the C++ original fails at, one key a call and several; everything at once; with other paths of messages, and other calls.
WORKLOADS = ["--workload race --batch 1", "--workload race", "", "--workload race --batch 4 --window 128 -t 4",
             "--workload race --batch 2 --sys.transport tcp", "--shared_memory 0", "-k 1", "--face python"]
SMALLER = {"--face python": 20, "--shared_memory 0": 5}     # slower by about so much: fewer keys in a job
CONFIGURATIONS = [(nodes, f"{words} --sys.location_caches {caches}".strip())
                  for words, (nodes, caches) in product(WORKLOADS, product((2, 3, 4), (0, 1)))]


def parse(argv):
    parser = argparse.ArgumentParser(prog="soak", description="Check the histories of real clusters for a long time.")
    parser.add_argument("--minutes", type=float, default=30, help="after which no new job is started (default: %(default)s)")
    parser.add_argument("--pulls", type=float, default=None, metavar="N", help="stop, too, when so many keys have been read")
    parser.add_argument("--job", type=float, default=5e6, metavar="N", help="keys to read in one job (default: %(default)g)")
    parser.add_argument("--seed", type=int, default=1, help="of the first job; the others count up (default: %(default)s)")
    parser.add_argument("--fault", action="append", default=[], metavar="NAME", help="put a bug into the nodes, see lapse.testing")
    return parser.parse_args(argv)


def commit():
    """Return the commit of this tree, with a + if the tree has changes."""
    def git(*words):
        return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, check=False).stdout.strip()
    return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def one_job(nodes, words, args, seed):
    """Run a job; return the keys read, the violations (None if it ended otherwise than by its checks), and its output."""
    pulls = round(args.job / SMALLER.get(words.partition(" --sys.location_caches")[0], 1))
    jobs = Jobs()
    try:
        result = jobs.launch(nodes, PROGRAM, "--pulls", max(1, pulls), "--seed", seed, *words.split(),
                             *(word for fault in args.fault for word in ("--fault", fault)), deadline=DEADLINE)
    finally:
        processes, files = jobs.close()
    reads = sum(int(number) for number in re.findall(r"job: (\d+) reads checked", result.text))
    wrong = sum(int(number) for number in re.findall(r"WRONG: [a-z ]+(?:\(the first: key \d+\))?: (\d+) but expected 0", result.text))
    ended = result.code == (1 if wrong else 0) and (wrong or reads) and not processes and not files
    left = f"\nleft behind: {processes} {files}" if processes or files else ""
    return reads, wrong if ended else None, result.text + left


def main(argv=None):
    args = parse(argv)
    start = time.monotonic()
    total, wrong, jobs, failed = 0, 0, 0, 0
    by_workload = Counter()
    seed = args.seed
    while time.monotonic() - start < args.minutes * 60 and (args.pulls is None or total < args.pulls):
        nodes, words = CONFIGURATIONS[seed % len(CONFIGURATIONS)]
        reads, violations, text = one_job(nodes, words, args, seed)
        jobs += 1
        total += reads
        by_workload["race" if "race" in words else "mixed"] += reads
        wrong += violations or 0
        failed += violations is None
        if violations != 0:
            what = "did not end well" if violations is None else f"{violations} violations"
            print(f"seed {seed}, {nodes} nodes, {words}: {what}\n{text}")
        seed += 1
        if sys.stdout.isatty():
            print(f"\r{jobs} jobs, {total:,} pulls, {wrong} violations", end="", flush=True)
    if sys.stdout.isatty():
        print()
    print(f"soak: commit {commit()}, seeds {args.seed}-{seed - 1}, {jobs} jobs of 2 to 4 nodes, {(time.monotonic() - start) / 60:.0f} min, "
          f"{os.cpu_count()} cores")
    print(f"soak: {total:,} pulls checked ({', '.join(f'{name} {count:,}' for name, count in sorted(by_workload.items()))}), "
          f"{wrong} violations, {failed} jobs that did not end well")
    return 1 if wrong or failed or not total else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("soak: interrupted", file=sys.stderr)
        sys.exit(130)
