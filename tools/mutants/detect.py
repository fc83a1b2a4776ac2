"""What catches a mutant: the simulation, its look for leaks, and the tests of single frames. Each mutant has a process of its own."""
from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import select
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy
from schemata import MOST

SECONDS = 2                     # of CPU time for one schedule, which takes milliseconds
DEADLINE = 120                  # seconds on the clock for a mutant
MEMORY = 3 << 30                # bytes of address space
LEAK_SEEDS = 24
STARVED = 1500                  # schedules in which one allocation fails


class Outcome(NamedTuple):
    """by: "simulation", "crash", "hang", "leak", "memory", "frames", or "" for a survivor. schedules: which one caught it, or how many
    came by it. what: in words."""
    by: str
    schedules: int
    what: str
    seconds: float


class Detectors:
    """Loads the package and the tests of a built copy of the tree, once; `try_one` forks a process per mutant."""

    def __init__(self, tree: Path, schedules: int):
        self.tree, self.schedules = tree, schedules
        self.library = ctypes.CDLL(str(tree / "selector.so"), ctypes.RTLD_GLOBAL)
        self.number = ctypes.c_int.in_dll(self.library, "lapse_mutant")
        self.fails_at = ctypes.c_int.in_dll(self.library, "lapse_fails_at")
        self.reached = (ctypes.c_ubyte * MOST).in_dll(self.library, "lapse_reached")
        sys.path.insert(0, str(tree))
        import lapse
        if Path(lapse.__file__).resolve().parent != (tree / "lapse").resolve():
            raise SystemExit(f"mutants: {lapse.__file__} was loaded, not the copy in {tree}")
        import pytest

        from lapse.testing import campaign
        from tests.ext.probe_build import load_extension
        load_extension(tree / "tests/ext/protocol_probe.pyx")           # built before anything is forked
        self.pytest, self.campaign = pytest, campaign
        self.settings = campaign.configurations()
        self.reach: dict[int, set[int]] = {}        # by mutant: the schedules that come by it; 0: the tests of frames do
        self.look()

    def setting(self, seed: int) -> dict:
        return self.campaign.varied(seed, self.settings)

    # --- in a child -------------------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Which schedules come by which mutants. A schedule that does not is the same with it and without it."""
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(reader)
                self.number.value = -1
                with os.fdopen(writer, "w") as out:
                    for seed in range(1, self.schedules + 1):
                        ctypes.memset(self.reached, 0, MOST)
                        self.campaign.attempt(seed, self.setting(seed))
                        print(json.dumps([seed, numpy.flatnonzero(numpy.frombuffer(self.reached, numpy.uint8)).tolist()]), file=out)
                    for i in range(1, STARVED + 1):
                        ctypes.memset(self.reached, 0, MOST)
                        if problem := starved(self.campaign, self.fails_at, i, self.settings):
                            print(json.dumps([problem, []]), file=out)
                            break
                        print(json.dumps([-i, numpy.flatnonzero(numpy.frombuffer(self.reached, numpy.uint8)).tolist()]), file=out)
                    ctypes.memset(self.reached, 0, MOST)
                    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                    self.frames()
                    print(json.dumps([0, numpy.flatnonzero(numpy.frombuffer(self.reached, numpy.uint8)).tolist()]), file=out)
            finally:
                os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as lines:
            for line in lines:
                seed, numbers = json.loads(line)
                if isinstance(seed, str):
                    raise SystemExit(f"mutants: without any mutant, an allocation that fails leads to: {seed}")
                for number in numbers:
                    self.reach.setdefault(number, set()).add(seed)
        os.waitpid(pid, 0)
        if not any(0 in seeds for seeds in self.reach.values()):
            raise SystemExit("mutants: the run without any mutant has failed")

    def frames(self) -> tuple[int, list[str]]:
        failed = Failures()
        code = self.pytest.main(["-q", "-x", "-p", "no:cacheprovider", *map(str, sorted(self.tree.glob("tests/unit/test_protocol*.py"))),
                                 "--deselect", "tests/unit/test_protocol.py::test_anything", "--rootdir", str(self.tree)], plugins=[failed])
        return code, failed.names

    def run(self, seeds, tell) -> tuple[str, int, str]:
        schedules = sorted(seed for seed in seeds if seed > 0)
        for seed in schedules:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            tell(seed)
            try:
                violation = self.campaign.attempt(seed, self.setting(seed))
            except Exception as error:
                return "simulation", seed, f"{type(error).__name__}: {error}"
            if violation is not None:
                return "simulation", seed, violation.problem
        signal.setitimer(signal.ITIMER_PROF, 30)
        for seed in schedules[:LEAK_SEEDS]:
            if lost := self.campaign.leaked(seed, self.setting(seed)):
                return "leak", seed, f"each run of seed {seed} leaves {lost} bytes"
        for i in sorted(-seed for seed in seeds if seed < 0):
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            tell(-i)
            if problem := starved(self.campaign, self.fails_at, i, self.settings):
                return "memory", i, problem
        signal.setitimer(signal.ITIMER_PROF, 30)
        tell(0)
        if 0 in seeds:
            code, names = self.frames()
            if code == 1:
                return "frames", 0, names[0] if names else "?"
            if code != 0:
                raise SystemExit(f"mutants: pytest ended with {code}")
        return "", len(schedules), ""

    def child(self, number: int, pipe: int) -> None:
        def tell(seed):
            os.write(pipe, (json.dumps(seed) + "\n").encode())

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1)
        os.dup2(devnull, 2)
        self.number.value = number
        seeds = self.reach.get(number, set()) if number else set(range(self.schedules + 1))
        os.write(pipe, (json.dumps(self.run(seeds, tell)) + "\n").encode())

    # --- in the parent ----------------------------------------------------------------------------------------------------

    def try_one(self, number: int) -> Outcome:
        """Run everything with this mutant, until something catches it."""
        begin = time.monotonic()
        reader, writer = os.pipe()
        gc.freeze()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.close(reader)
                self.child(number, writer)
                code = 0
            finally:
                os._exit(code)
        os.close(writer)
        said, late = b"", False
        while True:
            ready, _, _ = select.select([reader], [], [], max(0.0, begin + DEADLINE - time.monotonic()))
            if not ready:
                late = True
                os.kill(pid, signal.SIGKILL)
                break
            some = os.read(reader, 65536)
            if not some:
                break
            said += some
        os.close(reader)
        status = os.waitpid(pid, 0)[1]
        lines = [json.loads(line) for line in said.decode().splitlines()]
        seconds = round(time.monotonic() - begin, 2)
        if lines and isinstance(lines[-1], list):
            return Outcome(*lines[-1], seconds)
        seed = lines[-1] if lines else 0
        where = f"in schedule {abs(seed)}" if seed else "in the tests of frames"
        if seed < 0:
            return Outcome("memory", -seed, f"crash or hang {where}, without memory", seconds)
        if late or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF):
            return Outcome("hang" if seed else "frames", seed, f"hangs {where}", seconds)
        what = signal.strsignal(os.WTERMSIG(status)) if os.WIFSIGNALED(status) else f"exit code {os.waitstatus_to_exitcode(status)}"
        return Outcome("crash" if seed else "frames", seed, f"{what} {where}", seconds)


def starved(campaign, fails_at, i: int, settings: list[dict]) -> str:
    """Schedule i with one allocation that fails; what comes of it in words, "" if that is as it should be."""
    fails_at.value = 1 + i * 7919 % 700
    try:
        violation = campaign.attempt(i, campaign.varied(i * 7 % 99 + 1, settings))
    except MemoryError:
        return ""
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        fails_at.value = 0
    # (a key that could not be kept has no owner for the moment in which the node goes down)
    expected = ("out of memory", "could not be sent", "error -7", "error -3", "has 0 owners")
    return "" if violation is None or any(text in violation.problem for text in expected) else violation.problem


class Failures:
    """A plugin of pytest: which tests failed."""

    def __init__(self):
        self.names: list[str] = []

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.names.append(report.nodeid.split("::")[-1])
