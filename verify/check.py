"""Check the model of the protocol: `python verify/check.py` (make model). Needs spin and a C compiler.

Searches the state space of every configuration in CONFIGURATIONS, where nothing may be found, and of every one in BUGS, where
something must be. Prints a table of each. Exit code 1 if a configuration has an error or was not searched to its end, or a bug is
not caught; 2 if a tool is missing or does not do its work.
"""
import argparse
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build/model"
DEPTH = 100_000                 # of the search; reaching it is an error
LONGEST = 4 * 3600              # seconds for one search, after which it counts as not finished
# The server processes never end, so pan must not call that a deadlock (-E): the model's own audit does, by name.
PAN = ["-E", f"-m{DEPTH}"]

# name: macros (see lapse.pml). Workers are on nodes 1 and 2 unless W0, W1, W2 say otherwise; node 0 is the home of key 0.
CONFIGURATIONS = {
    "synchronous": "NW=2",
    "synchronous, 2 localizes": "NW=2 NL=2",
    "asynchronous": "NW=2 ASYNC NP=2",
    "asynchronous, a worker at home": "NW=2 ASYNC NL=2 NG=0 W0=0 W1=1",
    "asynchronous, 2 workers of a node": "NW=2 ASYNC NL=2 W0=1 W1=1",
    "three workers": "NW=3 ASYNC NG=0",
    "caches": "NW=2 ASYNC CACHE",
    "caches, a worker at home": "NW=2 ASYNC CACHE W0=0 W1=1",
    "fine steps": "NW=2 ASYNC FINE NG=0",
    "fine steps, a worker at home": "NW=2 ASYNC FINE W0=0 W1=1 NG=0",
    "fine steps, 2 workers at home": "NW=3 ASYNC FINE W0=0 W1=0 W2=1 NP=0",
    "two keys": "NW=2 ASYNC K=2 PAIRS NG=0",
    "two keys, one or both": "NW=2 K=2 NG=0",
    "a node dies": "NW=2 DEATH NG=0",
    "a node dies, asynchronous": "NW=2 DEATH ASYNC NG=0",
    "a message lost, numbered": "NW=2 SEQ CHAOS=1 NG=0",
    "a message doubled, numbered": "NW=2 SEQ CHAOS=2 NG=0",
    "channels out of order, numbered": "NW=2 SEQ CHAOS=3 NG=0",
}
FULL = {
    "three workers, pulls": "NW=3 ASYNC",
    "three workers, synchronous, 2 localizes": "NW=3 NL=2 NG=0",
    "caches, three workers": "NW=3 ASYNC CACHE NG=0",
    "caches, 2 pushes": "NW=2 ASYNC CACHE NP=2",
    "fine steps, pulls": "NW=2 ASYNC FINE",
    "fine steps, caches": "NW=2 ASYNC FINE CACHE NG=0 W0=1 W1=1",
    "two keys, pulls": "NW=2 ASYNC K=2 PAIRS",
    "two keys, one or both, pulls": "NW=2 K=2",
    "two keys, caches": "NW=2 ASYNC K=2 PAIRS CACHE NG=0",
    "a node dies, pulls": "NW=2 DEATH",
    "a node dies, three workers": "NW=3 DEATH NG=0",
    "a message lost, numbered, pulls": "NW=2 SEQ CHAOS=1 ASYNC",
}
# name: macros, the bug's own (B_..., CHAOS without SEQ) first
BUGS = {
    "a message is lost": "CHAOS=1 NW=2",
    "a message is doubled": "CHAOS=2 NW=2",
    "channels change the order": "CHAOS=3 NW=2 ASYNC",
    "an operation that meets an incoming key is forwarded": "B_NO_QUEUE NW=2 ASYNC",
    "the directory moves when the owner confirms": "B_LATE_HOME NW=3 ASYNC NG=0",
    "noting a next owner forgets the queue": "B_DROP_QUEUE NW=3 NG=0",
    "HAND_OVER of an incoming key is ignored": "B_NO_NEXT NW=3 NG=0",
    "incoming only after LOCALIZE was sent": "B_LATE_MARK NW=2 ASYNC W0=1 W1=1",
    "no second look under the channel's lock": "B_SPLIT_ROUTE NW=2 ASYNC W0=1 W1=1",
    "the second look at the first key only": "B_CHECK_FIRST K=2 PARTS NW=2 ASYNC W0=2 W1=2 HOME1=0",
    "caches without the cache rule": "B_NO_CACHE_RULE CACHE NW=2 ASYNC",
    "the row is visible before its queue is applied": "B_VISIBLE_EARLY FINE NW=2 ASYNC",
    "HAND_OVER with the epoch of its sending": "B_STALE_EPOCH FINE NW=3 ASYNC NP=0 NG=0",
    "only one node is told of a death": "B_ONE_TOLD DEATH NW=2 NG=0",
    "the home takes over a dead node's keys": "B_TAKE_OVER DEATH NW=2 NG=0",
}


@dataclass
class Outcome:
    states: int = 0
    caught: str = ""            # the check that failed; else empty
    finished: bool = False
    seconds: float = 0.0
    folder: Path = BUILD


@dataclass
class How:
    """How verifiers are made."""
    model: Path
    build: Path
    bits: int = 0               # bitstate hashing in 2^bits bits, 0: exact
    optimize: str = "-O0"       # a quick configuration takes less time to search than -O1 takes to compile


class ToolError(Exception):
    """spin or the compiler did not do its work."""


def run(command, folder, timeout=600):
    return subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          timeout=timeout, check=False)


def search(how, name, macros):
    """Generate, compile and run the verifier of one configuration."""
    folder = how.build / re.sub(r"\W+", "-", name)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    words = [f"-D{word}" for word in macros.split()]
    made = run(["spin", "-a", *words, str(how.model)], folder)
    if made.returncode or not (folder / "pan.c").exists():
        raise ToolError(f"spin, {name}: {made.stdout.strip()}")
    store = ["-DBITSTATE"] if how.bits else ["-DCOLLAPSE"]
    made = run(["gcc", how.optimize, "-w", "-DSAFETY", "-DVECTORSZ=2048", "-DMEMLIM=12000", *store, "-o", "pan", "pan.c"], folder)
    if made.returncode:
        raise ToolError(f"gcc, {name}: {made.stdout.strip()}")
    began = time.monotonic()
    try:
        text = run(["./pan", *PAN, *([f"-w{how.bits}"] if how.bits else [])], folder, LONGEST).stdout
    except subprocess.TimeoutExpired:
        text = ""
    (folder / "pan.out").write_text(text, encoding="utf-8")
    return read(text, time.monotonic() - began, folder)


def read(text, seconds, folder):
    """What pan says."""
    stored = re.search(r"^\s*([\d.e+]+) states, stored", text, re.MULTILINE)
    errors = re.search(r"errors: (\d+)", text)
    failed = re.search(r"^pan:1: (.*)", text, re.MULTILINE)
    check = failed and re.search(r"\|\|(\w+)\) \(at depth", failed[1])
    incomplete = re.search(r"Search not completed|max search depth too small|reached -DMEMLIM|out of memory", text)
    caught = (check[1] if check else failed[1]) if failed and errors and int(errors[1]) else ""
    return Outcome(int(float(stored[1])) if stored else 0, caught, bool(stored and errors and not incomplete), seconds, folder)


def search_all(how, chosen, jobs):
    """(name, macros, outcome) one after the other, as the table has them."""
    with ThreadPoolExecutor(jobs) as pool:
        started = [(name, macros, pool.submit(search, how, name, macros)) for name, macros in chosen.items()]
        for name, macros, task in started:
            yield name, macros, task.result()


def check_configurations(how, chosen, jobs):
    """Print the table; the sentences about what is wrong."""
    wrong = []
    print(f"{'configuration':42}{'macros':40}{'states':>12}{'errors':>8}{'seconds':>9}")
    for name, macros, found in search_all(how, chosen, jobs):
        print(f"{name:42}{macros:40}{found.states:12,}{1 if found.caught else 0:8}{found.seconds:9.1f}", flush=True)
        if found.caught:
            wrong.append(f"{name}: {found.caught}; the way there: cd {found.folder} && spin -t -p "
                         f"{' '.join('-D' + word for word in macros.split())} {how.model}")
        elif not found.finished or not found.states:
            wrong.append(f"{name}: the search did not come to its end, see {found.folder}/pan.out")
    return wrong


def check_bugs(how, chosen, jobs):
    wrong = []
    print(f"\n{'bug':56}{'macro':18}{'caught by':16}{'states':>10}{'seconds':>9}")
    for name, macros, found in search_all(how, chosen, jobs):
        switch = macros.split()[0]
        caught = found.caught not in ("", "room")           # (a channel that is too short for the model is no merit of it)
        print(f"{name:56}{switch:18}{found.caught if caught else 'NOT CAUGHT':16}{found.states:10,}{found.seconds:9.1f}", flush=True)
        if not caught:
            wrong.append(f"{switch}: not caught; see {found.folder}/pan.out")
    return wrong


def main(argv=None):
    parser = argparse.ArgumentParser(description="Check the model of the protocol.")
    parser.add_argument("--full", action="store_true", help="the large configurations instead of the quick ones (hours)")
    parser.add_argument("--bits", type=int, default=0, metavar="N", help="bitstate hashing in 2^N bits; 0: exact (default)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these configurations and bugs")
    parser.add_argument("--model", type=Path, default=ROOT / "verify/lapse.pml", metavar="FILE", help="another model")
    parser.add_argument("--build", type=Path, default=BUILD, metavar="FOLDER", help="where the verifiers are made (default: build/model)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="searches at once")
    args = parser.parse_args(argv)
    configurations, bugs = (FULL if args.full else CONFIGURATIONS), BUGS
    if args.only:
        if unknown := set(args.only) - set(CONFIGURATIONS | FULL | BUGS):
            parser.error(f"no configuration and no bug is called {sorted(unknown)[0]!r}")
        configurations = {name: macros for name, macros in (CONFIGURATIONS | FULL).items() if name in args.only}
        bugs = {name: macros for name, macros in BUGS.items() if name in args.only}
    for tool in ("spin", "gcc"):
        if not shutil.which(tool):
            print(f"make model: {tool} is not installed (on Debian: apt-get install {tool})", file=sys.stderr)
            return 2
    how = How(args.model.resolve(), args.build.resolve(), args.bits, "-O1" if args.full else "-O0")
    jobs = 1 if args.full else max(1, args.jobs)
    try:
        wrong = check_configurations(how, configurations, jobs) if configurations else []
        wrong += check_bugs(dataclasses.replace(how, bits=0), bugs, max(1, args.jobs)) if bugs else []
    except ToolError as error:
        print(f"make model: {error}", file=sys.stderr)
        return 2
    for sentence in wrong:
        print(f"make model: {sentence}", file=sys.stderr)
    if not wrong:
        print(f"\n{len(configurations)} configurations without an error, {len(bugs)} bugs caught")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
