"""Run one node on a host that ssh has reached: start it, pass signals on, and let nothing outlive the connection.

The launcher sends this file's text as the argument of `python -I -S -c`, so the host needs no copy of it. Standard library only.

Standard input brings the length of a JSON object, a newline, the object {mark, environ, cwd, command}, and then lines with the numbers
of signals for the node's process group. Its end, however it comes about, means that the launcher or the connection is gone: the
group is killed. Standard output and error are the node's own; lines on standard error that begin with the mark, which is secret and
random, are ours: `started PID`, `ended STATUS` (as subprocess tells it), `failed CODE why`.
"""
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GRACE = 2.0         # seconds from SIGTERM to SIGKILL for what a node that has ended leaves in its group
PREFIX = "lapse-"   # of folders that lapse.ipc sweeps when whoever holds the lock in them has died
PR_SET_PDEATHSIG = 1


def receive():
    """The object from standard input; None when the launcher is gone."""
    head = b""
    while not head.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            return None
        head += byte
    text = b""
    while len(text) < int(head):
        part = os.read(0, int(head) - len(text))
        if not part:
            return None
        text += part
    return json.loads(text)


def make_folder():
    """A private folder for ipc sockets with a short name, and the lock that says that it is in use."""
    base = tempfile.gettempdir()
    path = tempfile.mkdtemp(prefix=PREFIX, dir=base if len(base.encode()) <= 60 else "/tmp")
    making = Path(path, "making")
    lock = os.open(making, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    making.rename(making.with_name("lock"))
    return path


def die_with_parent():
    """In the child: get SIGKILL when this program is killed. Linux; elsewhere nothing."""
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def signal_group(group, number):
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def read_signals(pid, begun):
    """Pass on what the launcher says; `begun` is a line that has come in part. The same of the next; None at the end of standard input."""
    data = os.read(0, 4096)
    *lines, rest = (begun + data).split(b"\n")
    for line in lines:
        signal_group(pid, int(line))
    return rest if data else None


def wait(pid, wake):
    """Serve standard input until the node has ended, and return how, without reaping it."""
    begun = b""
    while True:
        end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if end is not None:
            return end.si_status if end.si_code == os.CLD_EXITED else -end.si_status
        ready = select.select([wake] if begun is None else [wake, 0], [], [])[0]
        if wake in ready:
            os.read(wake, 4096)
        if 0 in ready:
            begun = read_signals(pid, begun)
            if begun is None:
                signal_group(pid, signal.SIGKILL)


def end_group(process):
    """End what the node has left behind in its group, at once when the connection is gone, and reap the node."""
    signal_group(process.pid, signal.SIGTERM)
    process.wait()
    deadline = time.monotonic() + GRACE
    with contextlib.suppress(ProcessLookupError, PermissionError):
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            if select.select([0], [], [], 0.02)[0] and not os.read(0, 4096):
                break
        os.killpg(process.pid, signal.SIGKILL)


def run(job, report):
    try:
        os.chdir(job["cwd"])
    except OSError as error:
        report(f"failed 126 {job['cwd']}: {error.strerror}")
        return 126
    os.environ.update(job["environ"])
    read, write = os.pipe()
    for end in (read, write):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    folder = os.environ["LAPSE_IPC_DIR"] = make_folder()
    try:
        try:
            process = subprocess.Popen(job["command"], stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=die_with_parent)
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            report(f"failed {127 if missing else 126} {job['command'][0]}: {'command not found' if missing else error.strerror}")
            return 127 if missing else 126
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, lambda number, frame: signal_group(process.pid, signal.SIGKILL))
        report(f"started {process.pid}")
        status = wait(process.pid, read)
        report(f"ended {status}")
        end_group(process)
        return status if status >= 0 else 128 - status
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main():
    job = receive()
    if job is None:
        return 1
    mark = job["mark"]

    def report(text):
        line = f"{mark} {text}".replace("\n", " ").encode(errors="replace")[:4000] + b"\n"     # a pipe takes it whole, or not at all
        with contextlib.suppress(OSError):  # nobody reads any more
            while True:
                try:
                    os.write(2, line)
                    return
                except BlockingIOError:     # the node has made standard error non-blocking, and filled it
                    select.select([], [2], [])

    return run(job, report)


try:
    import ctypes
    prctl = ctypes.CDLL(None).prctl
except (ImportError, OSError, AttributeError):
    prctl = None

if __name__ == "__main__":
    sys.exit(main())
