"""The processes of a job's nodes: what they are given, their output, how they end; and Here, which starts them on this host.

Used by lapse/runner.py, which runs the job, and by lapse/ssh.py, where the nodes are on other hosts.
"""
from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from lapse import _exec
from lapse.config import CLUSTER_VARIABLES, SECRETS
from lapse.coordinator import end_text
from lapse.errors import LapseError
from lapse.keys import Secrets

LINE_BYTES = 1 << 20        # a longer line is broken
KILL_AFTER = 2.0            # seconds from SIGTERM to SIGKILL
NOT_PASSED_ON = (*CLUSTER_VARIABLES, "DMLC_NODE_HOST", "DMLC_INTERFACE", "LAPSE_RANK", "LAPSE_IPC_DIR", "LAPSE_KEYS", *SECRETS)


class CommandError(LapseError):
    """The command cannot be executed; `code` is what a shell would return."""

    def __init__(self, text: str, code: int):
        super().__init__(text)
        self.code = code


def find_command(name: str) -> None:
    """Raise CommandError unless `name` can be executed."""
    if os.sep not in name:
        if shutil.which(name) is None:
            raise CommandError(f"{name}: command not found", 127)
    elif not Path(name).exists():
        raise CommandError(f"{name}: no such file", 127)
    elif not Path(name).is_file():
        raise CommandError(f"{name}: not a file", 126)
    elif not os.access(name, os.X_OK):
        raise CommandError(f"{name}: not executable", 126)


def job_environment(rank: int, nodes: int, host: str, port: int, secrets: Secrets, folder: str | None) -> dict[str, str]:
    """The variables by which a process finds its job; one of them is a secret. `folder` is for ipc sockets."""
    variables = {"DMLC_ROLE": "server", "DMLC_NUM_SERVER": str(nodes), "DMLC_NUM_WORKER": "0", "DMLC_PS_ROOT_URI": host,
                 "DMLC_PS_ROOT_PORT": str(port), "LAPSE_RANK": str(rank), **secrets.environment(rank)}
    return {**variables, "LAPSE_IPC_DIR": folder} if folder else variables


def die_with_us() -> list[str]:
    """What to put before a command so that its process is killed when this one dies."""
    return [sys.executable, "-I", "-S", str(Path(_exec.__file__).absolute()), str(os.getpid())] if sys.executable else []


class Here:
    """This host: where the nodes of a job run when nothing else is said."""

    folder_here = True      # the launcher makes the folder for ipc sockets

    def check(self, command: list[str]) -> None:
        """Raise CommandError when it is clear that the command cannot be executed."""
        find_command(command[0])

    def security(self, environ: dict[str, str]) -> str | None:
        """The security mode of the job."""
        return environ.get("LAPSE_SECURITY") or None

    def root_host(self, environ: dict[str, str]) -> str:
        """Where the scheduler listens."""
        return "127.0.0.1"

    def prepare(self, interrupted: Callable[[], bool]) -> None:
        """What comes before the nodes; ends early when `interrupted()`."""

    def may_start(self, rank: int) -> bool:
        """Whether this node may be started now, or is to wait until something has happened to those that have been."""
        return True

    def prefix(self, rank: int) -> bytes:
        """What comes before each line that a node writes."""
        return b"[node %d] " % rank

    def start(self, rank: int, command: list[str], environ: dict[str, str], job: dict[str, str]) -> Node:
        """Start a node: `environ` is that of the launcher, `job` has the job's variables."""
        base = {name: value for name, value in environ.items() if name not in NOT_PASSED_ON}
        process = subprocess.Popen([*die_with_us(), *command], env={"PYTHONUNBUFFERED": "1", **base, **job}, stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, bufsize=0)
        return Node(rank, process)


class Stream:
    """One output stream of one node, cut into lines."""

    def __init__(self, prefix: bytes, pipe, sink):
        self.prefix = prefix
        self.pipe = pipe
        self.sink = sink
        self.rest = b""

    def feed(self, data: bytes) -> None:
        """Write all whole lines; b"" is the end of the stream, and of its last line."""
        text = self.rest + data
        lines = text.split(b"\n")
        self.rest = lines.pop()
        if len(self.rest) >= LINE_BYTES or (not data and self.rest):
            at = self.cut(self.rest) if data else len(self.rest)
            lines.append(self.rest[:at])
            self.rest = self.rest[at:]
        lines = self.select(lines)
        if lines:
            self.sink.write(b"".join(self.prefix + line + b"\n" for line in lines))

    def cut(self, rest: bytes) -> int:
        """Where a line that is too long may be broken."""
        return len(rest)

    def select(self, lines: list[bytes]) -> list[bytes]:
        """Which of the lines, and which others, are written."""
        return lines


class Node:
    """One node of the job, and the process of this host that stands for it."""

    def __init__(self, rank: int, process: subprocess.Popen):
        self.rank = rank
        self.process = process
        self.pid = process.pid          # of the node
        self.host = ""                  # another one than this
        self.trouble = ""               # what happened to it, where its status does not say that
        self.status: int | None = None  # as subprocess's returncode; known before the process is reaped
        self.signalled = False          # by us: how it ended says nothing
        self.pidfd: int | None = None

    def streams(self, prefix: bytes, sinks) -> list[Stream]:
        """Its output, of which each line gets the prefix."""
        return [Stream(prefix, pipe, sink) for pipe, sink in zip((self.process.stdout, self.process.stderr), sinks, strict=True)]

    restless = False                    # it wants `serve` to be called now and then

    def serve(self) -> None:
        """What it has to do for itself; never blocks."""

    def end(self, deadline: float) -> None:
        """Reap the process, which has been killed, by the deadline where that takes something else than this host."""
        self.process.wait()
        for pipe in (self.process.stdout, self.process.stderr):
            pipe.close()

    def signal(self, number: int) -> None:
        """To the whole group, which exists at least as the unreaped process itself."""
        self.signalled = self.signalled or self.status is None
        if self.process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def look(self) -> bool:
        """Note how the process ended, without reaping it; True if it has just ended."""
        if self.status is not None:
            return False
        if not hasattr(os, "waitid"):  # macOS before CPython 3.13; then the group is not signalled any more
            self.status = self.process.poll()
            return self.status is not None
        end = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if end is None:
            return False
        self.status = end.si_status if end.si_code == os.CLD_EXITED else -end.si_status
        return True

    @property
    def how(self) -> str:
        """How it ended."""
        return self.trouble or end_text(self.status)

    @property
    def failed_by_itself(self) -> bool:
        return bool(self.status) and not (self.signalled and self.status < 0)
