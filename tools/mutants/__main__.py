"""`python tools/mutants`: change the protocol's sources in one place at a time, and see whether the tests notice. `make mutants`.

Every mutant that nothing catches has to be explained in survivors.txt. Exit code 0: at least 90 % of those that are not equivalent are
caught, and the explanations are those of the survivors; else 1. Results are kept in build/mutants until a source changes: a run that was
interrupted goes on where it was.
"""
from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))

from schemata import Build, Mutant, selector  # noqa: E402

SOURCES = ["_protocol.pyx", "_routing.pyx", "_directory.pxd", "_directory.pyx", "_transfers.pxd", "_transfers.pyx", "_answers.pyx",
           "_pins.pyx", "_operations.pxd", "_operations.pyx", "_node_state.pyx"]
SOURCES = [f"lapse/{name}" for name in SOURCES]
PLAIN = ["lapse/_store.pyx", "lapse/testing/_world.pyx"]       # built anew without mutants, so that their allocations can fail
APART = ("fault", "statistics", "tracing", "report", "prefetch")      # kinds that the score leaves out
REASONS = ("equivalent", "performance", "memory", "hostile", "size", "unseen")
GOAL = 90                       # percent


# --- survivors.txt ----------------------------------------------------------------------------------------------------------------

def read_explanations(path: Path) -> dict[str, tuple[str, str]]:
    """{key of a mutant: (reason, explanation)}; a line `= reason: explanation` is about all keys up to the next one."""
    found: dict[str, tuple[str, str]] = {}
    reason = None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        if line.startswith("= "):
            name, _, text = line[2:].partition(": ")
            if name not in REASONS or not text:
                raise SystemExit(f"{path}:{number}: expected `= reason: explanation`, with a reason out of {', '.join(REASONS)}")
            reason = (name, text)
        elif reason is None or line in found:
            raise SystemExit(f"{path}:{number}: a mutant {'twice' if reason else 'without a reason'}: {line}")
        else:
            found[line] = reason
    return found


# --- the copy of the tree -----------------------------------------------------------------------------------------------------------

def state_of(paths) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:20]


def inputs() -> list[Path]:
    """What the outcome of a mutant depends on."""
    found = [path for pattern in ("lapse/*.p[yx]*", "lapse/testing/*.p*", "tests/ext/protocol_probe.pyx", "tests/unit/test_protocol*.py",
                                  "tools/mutants/schemata.py", "tools/mutants/detect.py") for path in ROOT.glob(pattern)]
    return [path for path in found if path.suffix in (".py", ".pyx", ".pxd")]


def copy_tree(tree: Path) -> None:
    """What the simulation and the tests of frames need, with the modules as they are built."""
    shutil.rmtree(tree, ignore_errors=True)
    ignore = shutil.ignore_patterns("__pycache__", "*.c")
    shutil.copytree(ROOT / "lapse", tree / "lapse", ignore=ignore)
    shutil.copytree(ROOT / "tests/ext", tree / "tests/ext", ignore=ignore)
    (tree / "tests/unit").mkdir()
    for path in ROOT.glob("tests/unit/test_protocol*.py"):
        shutil.copy(path, tree / "tests/unit")
    (tree / "pytest.ini").write_text("[pytest]\npythonpath = .\n")
    selector(tree)


def prepare(folder: Path, state: str) -> list[Mutant]:
    """Copy the tree and build the mutants into it, unless that has been done for this state."""
    tree, listing = folder / "tree", folder / "mutants.json"
    if listing.exists() and tree.exists():
        kept = json.loads(listing.read_text())
        if kept["state"] == state:
            return [Mutant(*mutant) for mutant in kept["mutants"]]
    begin = time.monotonic()
    copy_tree(tree)
    build = Build(tree, SOURCES)
    for source in [*SOURCES, *PLAIN]:
        if source.endswith(".pyx"):
            build.module(source)
    mutants = [mutant for name in SOURCES for mutant in build.mutants[name]]
    listing.write_text(json.dumps({"state": state, "mutants": mutants}))
    print(f"{len(mutants)} mutants built in {time.monotonic() - begin:.0f} s; {len(build.left_out)} more do not compile", flush=True)
    return mutants


# --- results ------------------------------------------------------------------------------------------------------------------------

class Results:
    """What became of each mutant, kept in a file."""

    def __init__(self, path: Path, state: str):
        self.path, self.state = path, state
        kept = json.loads(path.read_text()) if path.exists() else {}
        self.outcomes: dict[str, list] = kept.get("outcomes", {}) if kept.get("state") == state else {}

    def save(self) -> None:
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps({"state": self.state, "outcomes": self.outcomes}, indent=0))
        new.replace(self.path)


def matches(mutant: Mutant, only: list[str]) -> bool:
    return not only or any(text in mutant.key or text == f"{Path(mutant.file).name}:{mutant.line}" for text in only)


def run(mutants: list[Mutant], results: Results, folder: Path, schedules: int, limit: float | None) -> bool:
    """Try what has not been tried; False if the time was up before that."""
    waiting = [mutant for mutant in mutants if mutant.key not in results.outcomes]
    if not waiting:
        return True
    from detect import Detectors
    detectors = Detectors(folder / "tree", schedules)
    plain = detectors.try_one(0)
    if plain.by:
        raise SystemExit(f"mutants: without any mutant, {plain.by} finds something: {plain.what}")
    begin = time.monotonic()
    for done, mutant in enumerate(waiting, 1):
        try:
            results.outcomes[mutant.key] = list(detectors.try_one(mutant.number))
        except KeyboardInterrupt:
            results.save()
            raise
        late = limit is not None and time.monotonic() - begin > limit
        if late or done % 25 == 0 or done == len(waiting):
            results.save()
            alive = sum(not results.outcomes[each.key][0] for each in waiting[:done])
            print(f"{done} of {len(waiting)}, {alive} survive, {time.monotonic() - begin:.0f} s", flush=True)
        if late:
            return done == len(waiting)
    return True


# --- the report -----------------------------------------------------------------------------------------------------------------------

DETECTORS = ("simulation", "crash", "hang", "leak", "memory", "frames")


def table(mutants, results, explained) -> int:
    """Print what caught what; returns the score in percent of those that count."""
    rows = [*SOURCES, None]
    print(f"\n{'':24}{'mutants':>8}" + "".join(f"{name:>11}" for name in DETECTORS) + f"{'equivalent':>11}{'survive':>8}{'caught':>8}")
    for row in rows:
        chosen = [m for m in mutants if m.kind not in APART and row in (None, m.file)]
        by = Counter(results.outcomes[m.key][0] for m in chosen)
        equal = sum(not results.outcomes[m.key][0] and explained.get(m.key, ("", ""))[0] in ("equivalent", "performance") for m in chosen)
        caught = len(chosen) - by[""]
        score = 100 * caught / (len(chosen) - equal) if len(chosen) > equal else 100.0
        print(f"{(row or 'all').removeprefix('lapse/'):24}{len(chosen):8}" + "".join(f"{by[name]:11}" for name in DETECTORS)
              + f"{equal:11}{by[''] - equal:8}{score:7.1f}%")
    for kind in APART:
        chosen = [m for m in mutants if m.kind == kind]
        print(f"apart, {kind + ':':17}{len(chosen):8}, of which {sum(bool(results.outcomes[m.key][0]) for m in chosen)} are caught")
    return score


def complaints(mutants, results, explained, whole: bool) -> list[str]:
    """Survivors without an explanation; and, of a whole run, explanations without a survivor."""
    survivors = {m.key for m in mutants if m.kind not in APART and not results.outcomes[m.key][0]}
    found = [f"nothing catches, and nothing explains: {key}" for key in sorted(survivors - explained.keys())]
    known = {m.key: m for m in mutants}
    for key in explained if whole else [key for key in explained if key in known]:
        if key not in known:
            found.append(f"explained, but no mutant: {key}")
        elif results.outcomes[key][0]:
            found.append(f"explained, but caught ({results.outcomes[key][0]}: {results.outcomes[key][2]}): {key}")
    return found


def main() -> int:
    p = argparse.ArgumentParser(prog="python tools/mutants", description=__doc__.split("\n")[0])
    p.add_argument("--every", type=int, default=1, metavar="N", help="a sample: every Nth mutant")
    p.add_argument("--only", action="append", default=[], metavar="TEXT", help="those with this in their key, or at file.pyx:line")
    p.add_argument("--schedules", type=int, default=1000, help="of the simulation per mutant (default: %(default)s)")
    p.add_argument("--seconds", type=float, help="stop after so long; the next run goes on from there. Exit code 2")
    p.add_argument("--list", action="store_true", help="print what became of each")
    args = p.parse_args()
    if args.every < 1 or args.schedules < 1:
        p.error("--every and --schedules must be positive")
    folder = ROOT / "build/mutants"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        state = f"{state_of(inputs())}-{args.schedules}"
        mutants = prepare(folder, state)
        mutants = [m for m in mutants[::args.every] if matches(m, args.only)]
        if not mutants:
            sys.exit("mutants: nothing to do: no mutant is like that")
        results = Results(folder / "results.json", state)
        if not run(mutants, results, folder, args.schedules, args.seconds):
            return 2
    explained = read_explanations(HERE / "survivors.txt")
    if args.list:
        for m in mutants:
            by, schedules, what, seconds = results.outcomes[m.key]
            print(f"{by or 'SURVIVES'}{f' ({schedules})' if by else ''} {m.kind} {m.file}:{m.line} {seconds} s: {m.key} : {what}")
    score = table(mutants, results, explained)
    whole = args.every == 1 and not args.only
    wrong = complaints(mutants, results, explained, whole)
    print(*wrong, sep="\n")
    if whole and score < GOAL:
        wrong.append(f"{score:.1f} % of the mutants that are not equivalent are caught, fewer than {GOAL} %")
        print(wrong[-1])
    return 1 if wrong else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("mutants: interrupted; the next run goes on from here", file=sys.stderr)
        sys.exit(130)
