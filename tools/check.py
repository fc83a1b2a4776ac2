"""`make check`: the stages that a change has to pass, several at once: `tools/check.py [--at-once N] STAGE…`; a stage is a make target.

Tells when a stage begins and ends, and now and then how far those are that run. All that a stage writes goes to build/check/STAGE.log; that
of one that fails is printed whole, and so is that of one which takes longer than --limit and is ended. The others run on. Ends with a
table of the time that each has taken, and names what has failed: exit code 1 if anything has.
"""
import argparse
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / "build/check"
OFTEN = 30              # seconds between two words about those that run
LIMIT = 2400            # seconds for a stage: the longest takes a quarter of that
GRACE = 5               # seconds for a stage that has to end


@dataclass
class Stage:
    name: str
    log: Path
    process: subprocess.Popen
    begun: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    processor: float = 0.0      # seconds of processor time, those of its descendants too
    code: int | None = None
    late: bool = False

    def has_ended(self) -> bool:
        pid, status, used = os.wait4(self.process.pid, os.WNOHANG)
        if pid:
            self.seconds, self.processor = time.monotonic() - self.begun, used.ru_utime + used.ru_stime
            self.code = self.process.returncode = os.waitstatus_to_exitcode(status)
        return bool(pid)

    def outcome(self) -> str:
        return "ended: it took too long" if self.late else f"exit code {self.code}"

    def last_words(self) -> str:
        lines = self.log.read_text("utf-8", "replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")[-100:]

    def end(self) -> None:
        """End its process group; in time for its own last words, and for it to end what it has started in other groups."""
        if self.code is not None:
            return
        pid, until = self.process.pid, time.monotonic() + GRACE
        os.killpg(pid, signal.SIGINT)
        while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None and time.monotonic() < until:
            time.sleep(0.05)
        os.killpg(pid, signal.SIGKILL)      # the rest of the group, whose number is nobody else's until the process has been asked for
        while not self.has_ended():
            time.sleep(0.05)
        self.code = self.code or 1          # it was not done


def start(name: str) -> Stage:
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / f"{name}.log"
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    with log.open("wb") as output:      # a group of its own, so that all of it can be ended
        process = subprocess.Popen(["make", "--no-print-directory", f"PYTHON={sys.executable}", name], cwd=ROOT, env=clean,
                                   stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    return Stage(name, log, process)


def tell(stage: Stage) -> None:
    """How a stage has ended."""
    if stage.code:
        written = stage.log.read_text("utf-8", "replace").rstrip("\n")
        print(f"----- {stage.name}: {stage.log}\n{written}\n----- end of {stage.name}")
    how = f"FAILED ({stage.outcome()})" if stage.code else "ok"
    print(f"check: {stage.name} {how}, {stage.seconds:.0f} s: {stage.last_words()}", flush=True)


def run(names: list[str], at_once: int, limit: float, told: list[int]) -> list[Stage]:
    """Run the stages, in this order, so many at once; each as it is in the end. Ends them when a signal is put into `told`."""
    waiting, running, ended = list(names), [], []
    said = time.monotonic()
    try:
        while (waiting or running) and not told:
            while waiting and len(running) < at_once:
                running.append(start(waiting.pop(0)))
                print(f"check: {running[-1].name} begins", flush=True)
            for stage in running:
                if not stage.has_ended() and time.monotonic() - stage.begun > limit:
                    stage.late = True
                    stage.end()
            for stage in [stage for stage in running if stage.code is not None]:
                running.remove(stage)
                ended.append(stage)
                tell(stage)
            if time.monotonic() - said > OFTEN:
                said = time.monotonic()
                for stage in running:
                    print(f"check: {stage.name} {said - stage.begun:.0f} s: {stage.last_words()}", flush=True)
            time.sleep(0.1)
    finally:
        for stage in running:
            stage.end()
        for stage in running:
            tell(stage)
    return ended


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="check.py", description="Run stages of the Makefile, several at once.")
    parser.add_argument("--at-once", type=int, default=2, metavar="N", help="how many (default: 2)")
    parser.add_argument("--limit", type=float, default=LIMIT, metavar="S", help=f"seconds for a stage (default: {LIMIT})")
    parser.add_argument("stages", nargs="+", metavar="STAGE")
    options = parser.parse_args(arguments)
    begun = time.monotonic()
    told: list[int] = []        # not an exception, which could come between the start of a stage and the note of it
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: told.append(number))
    ended = run(options.stages, max(1, options.at_once), options.limit, told)
    if told:
        print(f"check: ended by signal {told[0]}", file=sys.stderr)
        return 128 + told[0]
    print(f"\n{'stage':16}{'seconds':>9}{'processor':>11}")
    for stage in sorted(ended, key=lambda stage: -stage.seconds):
        print(f"{stage.name:16}{stage.seconds:9.0f}{stage.processor:11.0f}{'  FAILED' if stage.code else ''}")
    print(f"{'all':16}{time.monotonic() - begun:9.0f}{sum(stage.processor for stage in ended):11.0f}")
    failed = [stage for stage in ended if stage.code]
    for stage in failed:
        print(f"check: failed: {stage.name} ({stage.outcome()}; {stage.log.relative_to(ROOT)})")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
