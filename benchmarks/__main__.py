"""`python -m benchmarks`: run the benchmarks and print one table; the exit code tells whether they ran, not how fast.

The rows are kept in build/bench.json; a run of some benchmarks replaces their rows there and leaves the others.
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import time
import traceback
from pathlib import Path

from benchmarks import calls, kge, memory, mf, remote, report, rescal, rows, sampling, security, w2v, w2v_text

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "benchmarks" / "README.md"
KEPT = ROOT / "build" / "bench.json"
BENCHMARKS = {"local": rows, "calls": calls, "remote": remote, "security": security, "memory": memory, "sampling": sampling, "mf": mf,
              "kge": kge, "rescal": rescal, "w2v": w2v, "w2v_text": w2v_text}
ON_REQUEST = ("kge", "rescal", "w2v", "w2v_text")         # they take an hour, most of it their peers, whose environments have gigabytes
BEGIN, END = "<!-- table: python -m benchmarks --readme -->", "<!-- end of table -->"


def load() -> dict:
    """{benchmark: {"rows": …, "command": …, …}} of the earlier runs."""
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    return {name: kept[name] for name in BENCHMARKS if name in kept}


def save(kept: dict) -> None:
    KEPT.parent.mkdir(exist_ok=True)
    KEPT.write_text(json.dumps(kept, indent=1) + "\n")


def rows_of(part: dict) -> list[report.Row]:
    """JSON knows no NaN: null stands for it."""
    return [report.Row(**{key: math.nan if value is None else value for key, value in row.items()}) for row in part["rows"]]


def run(name: str, quick: bool, command: str) -> dict:
    load_before = os.getloadavg()[0]
    started = time.time()
    rows = BENCHMARKS[name].run(quick=quick)
    return {"rows": [{key: None if isinstance(value, float) and math.isnan(value) else value
                      for key, value in dataclasses.asdict(row).items()} for row in rows],
            **report.machine(), "command": command, "date": time.strftime("%Y-%m-%d %H:%M", time.localtime(started)),
            "seconds": round(time.time() - started, 1), "load": f"{load_before:.1f} before, {os.getloadavg()[0]:.1f} after"}


def heading(kept: dict) -> str:
    """The machine, and when each part was run."""
    lines = list(dict.fromkeys(f"{part['machine']}; {part['software']}." for part in kept.values()))
    lines += [f"{name}: {part['date']}, `{part['command']}`, {part['seconds']:g} s; load average {part['load']}."
              for name, part in kept.items()]
    return "\n".join(f"* {line}" for line in lines)


def write_readme(kept: dict) -> None:
    text = README.read_text()
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        sys.exit(f"{README} has no place for the table: {BEGIN} … {END}")
    table = report.markdown([row for part in kept.values() for row in rows_of(part)])
    README.write_text(f"{before}{BEGIN}\n\n{heading(kept)}\n\n{table}\n\n{END}{after}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=BENCHMARKS, metavar="NAME",
                        help=f"one of {', '.join(BENCHMARKS)}; repeatable; {', '.join(ON_REQUEST)} run only so")
    parser.add_argument("--quick", action="store_true", help="few rounds: about a quarter of the time, and noisier")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown, with the machine and the dates")
    parser.add_argument("--show", action="store_true", help=f"run nothing: print what {KEPT.relative_to(ROOT)} keeps")
    parser.add_argument("--readme", action="store_true", help="write all that is kept into benchmarks/README.md, too")
    options = parser.parse_args(argv)
    command = " ".join(["python -m benchmarks", *(argv if argv is not None else sys.argv[1:])])
    kept = load()
    names = options.only or ([*BENCHMARKS] if options.show else [name for name in BENCHMARKS if name not in ON_REQUEST])
    broken = []
    for name in () if options.show else names:
        try:
            kept[name] = run(name, options.quick, command)
        except Exception:
            traceback.print_exc()
            broken.append(name)
        else:
            kept = {known: kept[known] for known in BENCHMARKS if known in kept}
            save(kept)
    shown = {name: part for name, part in kept.items() if name in names and name not in broken}
    rows = [row for part in shown.values() for row in rows_of(part)]
    print(f"{heading(shown)}\n\n{report.markdown(rows) if options.markdown else report.plain(rows)}")
    if options.readme:
        write_readme(kept)
    if broken:
        print(f"broken: {', '.join(broken)}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
