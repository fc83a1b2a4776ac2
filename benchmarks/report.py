"""What a benchmark yields, and how it is printed and kept."""
from __future__ import annotations

import dataclasses
import math
import operator
import os
import platform
import sys
import time
from pathlib import Path

OPERATORS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
HEAD = ("what", "measured", "reference", "ratio", "to reach", "C++ Lapse", "verdict")


@dataclasses.dataclass
class Row:
    """One requirement: a figure of ours, what it is compared with, and the bound. A row without a bound is there to be read."""

    what: str
    measured: float                 # median
    unit: str
    reference: float = math.nan     # in the same unit; median
    against: str = ""               # what the reference is
    ratio: float = math.nan         # median of the rounds' ratios, which need not be the ratio of the medians
    bound: str = ""                 # "<= 1.25": of the ratio, or of `measured` where there is no reference
    cpp: str = ""                   # the original, in the same unit
    note: str = ""

    @property
    def verdict(self) -> str:
        if not self.bound:
            return ""
        sign, limit = self.bound.split()
        value = self.measured if math.isnan(self.ratio) else self.ratio
        return "met" if OPERATORS[sign](value, float(limit)) else "MISSED"

    def cells(self) -> tuple[str, ...]:
        reference = "" if math.isnan(self.reference) else f"{number(self.reference)} {self.against}"
        ratio = "" if math.isnan(self.ratio) else f"{self.ratio:.2f}"
        unit = "" if self.bound == "" or ratio else f" {self.unit}"
        what = f"{self.what} ({self.note})" if self.note else self.what
        return (what, f"{number(self.measured)} {self.unit}", reference, ratio, self.bound + unit, self.cpp, self.verdict)


def against(what: str, measured: list[float], unit: str, name: str, reference: list[float], bound: str = "", cpp: str = "",
            note: str = "") -> Row:
    """A row that compares two sides measured in the same rounds."""
    return Row(what, median(measured), unit, median(reference), name, median([a / b for a, b in zip(measured, reference, strict=True)]),
               bound, cpp, note)


def against_cpp(what: str, measured: list[float], unit: str, figure: float, bound: str, cpp: str) -> Row:
    """A row that compares with a figure of the C++ original, which does not run here."""
    return Row(what, median(measured), unit, figure, "C++", median(measured) / figure, bound, cpp)


def median(values) -> float:
    values = sorted(values)
    middle = len(values) // 2
    return float(values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) / 2)


def number(x: float) -> str:
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:.3g}"


def progress(text: str) -> None:
    print(f"  {time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def machine() -> dict[str, str]:
    """Where and with what this runs."""
    import numpy
    import zmq

    import lapse
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"machine": f"{cores} cores of {model}, {platform.system()} {platform.release()}",
            "software": f"Lapse {lapse.__version__}, Python {platform.python_version()}, NumPy {numpy.__version__}, "
                        f"pyzmq {zmq.__version__}, libzmq {zmq.zmq_version()}"}


def plain(rows: list[Row]) -> str:
    table = [HEAD, *(row.cells() for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(HEAD))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def markdown(rows: list[Row]) -> str:
    lines = [HEAD, ["---"] * len(HEAD), *(row.cells() for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
