"""Jobs of real processes: each has a deadline, at which the stacks of its processes are printed, and is asked what it leaves behind."""
import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DEADLINE = 180          # seconds for a job
GRACE = 3               # seconds for the processes of a job that has ended, or has been told to
PROC = Path("/proc")


class Result:
    """What a job has printed, line by line and by node, and its exit code."""

    def __init__(self, code, text):
        self.code, self.text = code, text
        self.lines = [re.sub(r"^\[node \d+\] ", "", line) for line in text.splitlines()]
        self.prefixes = {(int(match[1]), int(match[2]))
                         for match in re.finditer(r"^\[node (\d+)\] node (\d+) ", text, re.MULTILINE)}

    def closing(self, name):
        """Return {node: (OK or WRONG, what is in the parentheses)} out of the closing lines of a program."""
        pattern = re.compile(rf"node (\d+) {name}: (OK|WRONG) \((.*)\)")
        found = [match for line in self.lines if (match := pattern.fullmatch(line))]
        nodes = {int(match[1]): (match[2], match[3]) for match in found}
        assert len(nodes) == len(found), f"a node has two closing lines:\n{self.text}"
        return nodes


class Jobs:
    """Starts jobs, one after the other, and knows their processes by a mark in the environment."""

    def __init__(self):
        self.mark = f"LAPSE_TEST_MARK={uuid.uuid4().hex}"
        self.folder = Path(tempfile.mkdtemp(prefix="lt-"))      # a short name: it may hold ipc sockets
        self.output = Path(tempfile.mkdtemp(prefix="lt-"))
        name, value = self.mark.split("=")
        self.env = {key: text for key, text in os.environ.items()
                    if not key.startswith(("DMLC_", "LAPSE_", "PS_", "MAKE", "MFLAGS"))}
        self.env.update({name: value, "TMPDIR": str(self.folder), "PYTHONFAULTHANDLER": "1", "PYTHON": sys.executable,
                         "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))})

    def run(self, *command, deadline=DEADLINE):
        """Run a command from the project's root and return its Result."""
        path = self.output / uuid.uuid4().hex
        with path.open("w+b") as output:
            process = subprocess.Popen([str(word) for word in command], cwd=ROOT, env=self.env, stdin=subprocess.DEVNULL,
                                       stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                code = process.wait(deadline)
            except subprocess.TimeoutExpired:
                self.end()
                process.wait()
                pytest.fail(f"{shlex.join(map(str, command))} did not end in {deadline} s:\n{path.read_text(errors='replace')}")
            except BaseException:
                self.end()
                process.wait()
                raise
        return Result(code, path.read_text(errors="replace"))

    def launch(self, nodes, *command, **how):
        """Run a Python program on so many nodes."""
        return self.run(sys.executable, "-m", "lapse", "run", "-s", nodes, sys.executable, *command, **how)

    def processes(self):
        """Return {pid: command line} of the processes that have the mark."""
        found = {}
        for folder in PROC.glob("[0-9]*"):
            with contextlib.suppress(OSError):      # not ours, or gone in the meantime
                if self.mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        return found

    def end(self):
        """End the processes with the mark; they print their stacks first."""
        for number in (signal.SIGABRT, signal.SIGKILL):
            for pid in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            self.settle()

    def settle(self):
        """Wait until no process has the mark, but no longer than GRACE; return those that have."""
        end = time.monotonic() + GRACE
        while (left := self.processes()) and time.monotonic() < end:
            time.sleep(0.05)
        return left

    def close(self):
        """Return what is left behind, and remove it."""
        processes = self.settle()
        files = [str(path) for path in self.folder.rglob("*")]
        if processes:
            self.end()
        shutil.rmtree(self.folder)
        shutil.rmtree(self.output)
        return processes, files
