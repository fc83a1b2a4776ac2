"""The nodes of a job on other hosts: the host file, the OpenSSH client, what it is told and what comes back.

Design: each node is one `ssh` process here, which runs lapse/_remote.py there. Nothing but that file's text and the name of the Python
that runs it is on a command line; environment, command, folder and secrets go over ssh's standard input, and so do signals. What
happened to the node comes back on its standard error, in lines that begin with a random mark which only the two ends know. When ssh
ends, for whatever reason, standard input ends over there, and the node is killed: so it cannot outlive the launcher, with which ssh dies.
"""
from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from lapse import _remote, hosts
from lapse.coordinator import end_text
from lapse.errors import LapseError
from lapse.processes import KILL_AFTER, NOT_PASSED_ON, CommandError, Node, Stream, die_with_us

log = logging.getLogger("lapse.launch")

SSH_FAILED = 255
EARLY_LINES = 100           # of ssh's own words that are kept
CONNECT_TIMEOUT = 10        # seconds
QUIET_COPY = 5.0            # seconds in which nothing is said about a copy
AT_ONCE = 6                 # connections to one host on which nobody is logged in yet: sshd refuses some of more than 10 (MaxStartups)
FIRST = ("-T", "-o", "BatchMode=yes")   # comes before what the user gives: ssh takes the first value of an option
DEFAULTS = ("-o", f"ConnectTimeout={CONNECT_TIMEOUT}", "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3",
            "-o", "ClearAllForwardings=yes", "-o", "ControlMaster=no")
PASSED_ON = re.compile(r"(LAPSE|DMLC|PS|OMP|OPENBLAS|MKL|LC)_\w+|PYTHON\w*|PATH|LD_LIBRARY_PATH|VIRTUAL_ENV|LANG")
_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?\Z")
_ADDRESS = re.compile(r"[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*(?:%[\w.-]+)?\Z")
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@\\-]*\Z")


class Host(NamedTuple):
    name: str
    user: str = ""
    port: int | None = None


def parse_host(text: str) -> Host:
    """`[user@]host[:port]`, an IPv6 address with a port in brackets; ValueError says what is wrong."""
    user, at, rest = text.rpartition("@")
    if at and not _USER.match(user):
        raise ValueError(f"{user!r} is not the name of a user")
    if rest.startswith("["):
        name, bracket, port = rest[1:].partition("]")
        if not bracket or (port and not port.startswith(":")):
            raise ValueError(f"{rest!r} is not [address] or [address]:port")
        colon, port = port[:1], port[1:]
    elif rest.count(":") > 1:
        name, colon, port = rest, "", ""
    else:
        name, colon, port = rest.partition(":")
    if not (_NAME.match(name) or _ADDRESS.match(name)):
        raise ValueError(f"{name!r} is not a host's name or address")
    if colon and not (re.fullmatch("[0-9]{1,5}", port) and 1 <= int(port) <= 65535):
        raise ValueError(f"{port!r} is not a port (1 to 65535)")
    return Host(name, user, int(port) if colon else None)


def read_hosts(path: str) -> list[Host]:
    """The hosts of a host file, one a line; `#` begins a comment. CommandError names file and line."""
    try:
        text = Path(path).read_text("utf-8")
    except OSError as error:
        raise CommandError(f"host file {path}: {error.strerror}", 2) from None
    except UnicodeDecodeError:
        raise CommandError(f"host file {path}: not a text file", 2) from None
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            if len(words) > 1:
                raise ValueError(f"one host is expected, not {len(words)} words")
            found.append(parse_host(words[0]))
        except ValueError as error:
            raise CommandError(f"{path}:{number}: {error}", 2) from None
    if not found:
        raise CommandError(f"host file {path}: it names no host", 2)
    return found


@dataclass
class Ssh:
    """Where the nodes of one job run: node i on the i-th host, and in turn when there are more nodes than hosts."""

    hosts: list[Host]
    port: int | None = None
    identity: str | None = None
    options: list[str] = field(default_factory=list)    # for ssh, as they are
    address: str | None = None          # where the scheduler listens; None: the address that reaches the hosts
    sync_dir: str | None = None
    python: str = sys.executable or "python3"
    environ: dict[str, str] = field(default_factory=dict)   # more variables for the nodes
    nodes: list[RemoteNode] = field(default_factory=list)   # that have been started

    folder_here = False                 # lapse/_remote.py makes the folders for ipc sockets

    # -- before the job

    def check(self, command: list[str]) -> None:
        """Raise CommandError unless the programs that are needed are on this host, and the settings make sense."""
        if self.sync_dir == "":         # the tree would be copied to / of every host
            raise CommandError("--sync-dir: the name of the folder is empty", 2)
        for name in ("ssh", *(["rsync"] if self.sync_dir else [])):
            if shutil.which(name) is None:
                raise CommandError(f"{name}: command not found; jobs over several hosts need it on this host", 127)
        if self.identity and not os.access(self.identity, os.R_OK):
            raise CommandError(f"identity file {self.identity}: cannot be read", 2)
        try:
            Path.cwd()
        except OSError as error:
            raise CommandError(f"the current folder: {error.strerror}", 2) from None

    def security(self, environ: dict[str, str]) -> str:
        """curve, or what LAPSE_SECURITY says; CommandError when that is not fit for a network."""
        wanted = environ.get("LAPSE_SECURITY") or "curve"
        if wanted == "token":
            raise CommandError("LAPSE_SECURITY token: jobs over ssh need curve, or none in a network that you trust", 2)
        return wanted

    def root_host(self, environ: dict[str, str]) -> str:
        """The address of this host that the others can reach."""
        given = self.address or environ.get("DMLC_PS_ROOT_URI")
        if given:
            return hosts.resolve(given)
        found: dict[str, str] = {}
        for host in dict.fromkeys(self.hosts):
            try:
                found.setdefault(hosts.address_towards(hosts.resolve(self._real_name(host))), host.name)
            except LapseError as error:
                raise LapseError(f"host {host.name}: {error} (a misspelt name? If ssh alone knows the way to it: --host says on which "
                                 "address of this host the scheduler is to listen)") from None
        outside = [address for address in found if not hosts.is_loopback(address)]
        if len(outside) > 1:
            pairs = ", ".join(f"{found[address]} from {address}" for address in outside)
            raise LapseError(f"the hosts are reached from several addresses of this host ({pairs}); choose one with --host")
        return (outside or list(found))[0]

    def _real_name(self, host: Host) -> str:
        """What ssh's configuration makes of the name."""
        try:
            done = subprocess.run([*self.client(host), "-G", "--", host.name], capture_output=True, text=True, stdin=subprocess.DEVNULL,
                                  timeout=CONNECT_TIMEOUT, check=False)
        except subprocess.TimeoutExpired:
            raise LapseError("ssh -G does not answer") from None
        if done.returncode:
            raise LapseError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "ssh does not take the options")
        return next((line.split()[1] for line in done.stdout.splitlines() if line.startswith("hostname ")), host.name)

    def client(self, host: Host) -> list[str]:
        """The ssh command without the host's name."""
        port = host.port or self.port
        return ["ssh", *FIRST, *self.options, *DEFAULTS, *(["-i", self.identity, "-o", "IdentitiesOnly=yes"] if self.identity else []),
                *(["-p", str(port)] if port else []), *(["-l", host.user] if host.user else [])]

    def prepare(self, interrupted: Callable[[], bool]) -> None:
        """Copy the tree to every host, if that is wanted; CommandError names the host where it cannot be done."""
        if self.sync_dir is None:
            return
        running = []
        try:
            for host in dict.fromkeys(self.hosts):
                name = f"[{host.name}]" if ":" in host.name else host.name
                place = self.sync_dir if self.sync_dir.startswith("/") else f"./{self.sync_dir}"    # `host::module` is something else
                words = tempfile.TemporaryFile()    # noqa: SIM115  closed below
                running.append((host, words, subprocess.Popen(
                    [*die_with_us(), "rsync", "-az", "-s", "-e", " ".join(map(_rsync_word, self.client(host))), "--", "./",
                     f"{name}:{place}/"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=words,
                    start_new_session=True)))
                log.info("copying the tree to %s:%s", host.name, self.sync_dir)
            begin: float | None = time.monotonic()
            while (waiting := [host.name for host, _, process in running if process.poll() is None]) and not interrupted():
                if begin is not None and time.monotonic() > begin + QUIET_COPY:
                    begin = None
                    log.warning("still copying the current folder to %s", ", ".join(waiting))
                if any(process.poll() for _, _, process in running):
                    break
                time.sleep(0.05)
            for host, words, process in running:
                if process.poll():
                    words.seek(0)
                    raise CommandError(f"host {host.name}: cannot copy the tree to {self.sync_dir}: "
                                       f"{_last(words.read().splitlines(), end_text(process.returncode))}", 1)
        finally:
            for _, words, process in running:
                if process.poll() is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                words.close()

    # -- the nodes

    def may_start(self, rank: int) -> bool:
        host = self._host(rank)
        return sum(node.status is None and not node.started and self._host(node.rank) == host for node in self.nodes) < AT_ONCE

    def prefix(self, rank: int) -> bytes:
        return f"[node {rank} {self._host(rank).name}] ".encode()

    def _host(self, rank: int) -> Host:
        return self.hosts[rank % len(self.hosts)]

    def start(self, rank: int, command: list[str], environ: dict[str, str], job: dict[str, str]) -> RemoteNode:
        passed = {name: value for name, value in environ.items() if PASSED_ON.fullmatch(name) and name not in NOT_PASSED_ON}
        host = self._host(rank)
        source = Path(_remote.__file__).read_text("utf-8")
        process = subprocess.Popen(
            [*die_with_us(), *self.client(host), "--", host.name, "exec " + shlex.join([self.python, "-I", "-S", "-c", source])],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, bufsize=0)
        node = RemoteNode(rank, process, host.name, self.python)
        text = json.dumps({"mark": node.mark.decode(), "cwd": self.sync_dir or str(Path.cwd()), "command": command,
                           "environ": {"PYTHONUNBUFFERED": "1", **passed, **self.environ, **job}}).encode()
        os.set_blocking(process.stdin.fileno(), False)
        node.send(b"%d\n%s" % (len(text), text))
        self.nodes.append(node)
        return node


class RemoteNode(Node):
    """One node on another host. `process` is the ssh of this host, `pid` the node's over there, 0 until it has started."""

    def __init__(self, rank: int, process: subprocess.Popen, host: str, python: str):
        super().__init__(rank, process)
        self.pid = 0
        self.host = host
        self.mark = b"\0lapse-" + secrets.token_hex(16).encode()
        self.started = False
        self.early: list[bytes] = []            # lines of standard error from before that: ssh's words
        self._python = python
        self._told: int | None = None           # the status that the other end has reported
        self._outgoing = b""
        self._errors: _Errors | None = None
        self._give_up: float | None = None      # when ssh is killed, if nothing comes back
        self._patience: float | None = None     # until when standard error may come after the end of ssh

    def streams(self, prefix: bytes, sinks) -> list[Stream]:
        self._errors = _Errors(prefix, self.process.stderr, sinks[1], self)
        return [Stream(prefix, self.process.stdout, sinks[0]), self._errors]

    # -- to the other end

    def send(self, data: bytes) -> None:
        self._outgoing += data
        self._flush()

    def _flush(self) -> None:
        """Send what can be sent without waiting."""
        try:
            while self._outgoing and not self.process.stdin.closed:
                self._outgoing = self._outgoing[os.write(self.process.stdin.fileno(), self._outgoing):]
        except BlockingIOError:
            pass
        except OSError:         # ssh has ended; how, is told by `look`
            self._outgoing = b""

    @property
    def restless(self) -> bool:
        return bool(self._outgoing) or (self._give_up is not None and self.status is None)

    def serve(self) -> None:
        self._flush()
        if self._give_up is not None and time.monotonic() > self._give_up:
            self._end_ssh(signal.SIGKILL)   # nothing is heard of it: its host is frozen, or the network is cut

    def signal(self, number: int) -> None:
        self.signalled = self.signalled or self.status is None
        if number == signal.SIGKILL:
            self._give_up = self._give_up or time.monotonic() + KILL_AFTER
        if self.started:
            self.send(b"%d\n" % number)
        elif number != signal.SIGCONT:
            self._end_ssh(signal.SIGTERM)   # it is still on its way; over there, this is the end of standard input

    def end(self, deadline: float) -> None:
        with contextlib.suppress(OSError):
            self.process.stdin.close()      # over there: kill what is left, and go
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(max(0.01, deadline - time.monotonic()))
        self._end_ssh(signal.SIGKILL)
        super().end(deadline)

    def _end_ssh(self, number: int) -> None:
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, number)

    # -- from the other end

    def hear(self, words: list[str]) -> None:
        """A report of lapse/_remote.py."""
        kind, value, *rest = [*words, "", ""]
        if kind == "started":
            self.started, self.pid = True, int(value)
            log.info("node %d runs on %s, pid %d", self.rank, self.host, self.pid)
        elif kind == "ended":
            self._told = int(value)
        elif kind == "failed":
            self._told = int(value)
            self.trouble = f"cannot start on host {self.host}: {' '.join(rest).strip()}"

    def look(self) -> bool:
        if self.status is not None:
            return False
        if self._told is not None:
            self.status = self._told
            return True
        end = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if end is None:
            return False
        if self._errors is not None and not self._errors.ended:     # it may have a report in it
            self._patience = self._patience or time.monotonic() + 1.0
            if time.monotonic() < self._patience:
                return False
        self.status = -int(signal.SIGTERM) if self.signalled else self._ssh_ended(end)
        return True

    def _ssh_ended(self, end) -> int:
        """ssh has ended without a word about the node."""
        status = end.si_status if end.si_code == os.CLD_EXITED else -end.si_status
        why = _last(self.early, end_text(status))
        for line in self.early:
            log.info("node %d: %s", self.rank, line.decode(errors="replace"))
        if self.started:
            self.trouble = f"the connection to host {self.host} broke (ssh {end_text(status)})"
        elif status in (126, 127):
            self.trouble = f"cannot run {self._python} on host {self.host}: {why}"
        else:
            self.trouble = f"cannot start on host {self.host}: {why}{self._host_key(why)}"
        return status or 1

    def _host_key(self, why: str) -> str:
        """What is wrong with the host's key, when ssh will not have it."""
        if not why.startswith("Host key verification failed"):
            return ""
        if any(b"HAS CHANGED" in line for line in self.early):
            return f": it is not the key that is known here as that of {self.host}"
        return f": this host's key is not known here; log in to {self.host} once by ssh, and compare it"


class _Errors(Stream):
    """Standard error of ssh: reports are heard, and what comes before the node has started is kept back."""

    def __init__(self, prefix: bytes, pipe, sink, node: RemoteNode):
        super().__init__(prefix, pipe, sink)
        self._node = node
        self.ended = False

    def feed(self, data: bytes) -> None:
        super().feed(data)
        self.ended = self.ended or not data

    def cut(self, rest: bytes) -> int:
        at = rest.rfind(self._node.mark[:1])
        return at if at > 0 and self._node.mark.startswith(rest[at:at + len(self._node.mark)]) else len(rest)

    def select(self, lines: list[bytes]) -> list[bytes]:
        node, out = self._node, []
        for line in lines:
            text, mark, report = line.partition(node.mark)
            held = not node.started
            if mark:
                node.hear(report.decode(errors="replace").split())
                if held and node.started:
                    out += node.early
            if text or not mark:
                if held:
                    node.early = [*node.early, text][-EARLY_LINES:]
                else:
                    out.append(text)
        return out


def _last(lines: list[bytes], otherwise: str) -> str:
    """The last thing that was said, without rsync's own remark that its ssh has failed."""
    said = [line.decode(errors="replace").strip() for line in lines]
    said = [line for line in said if line and not line.startswith(("rsync error: ", "rsync: connection unexpectedly closed"))]
    return said[-1].rstrip(".") if said else otherwise


def _rsync_word(word: str) -> str:
    """A word for rsync's -e, which knows quotes, doubled inside themselves, and no backslash."""
    return word if re.fullmatch(r"[\w@%+=:,./-]+", word) else "'" + word.replace("'", "''") + "'"
