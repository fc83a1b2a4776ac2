"""Folders for ipc sockets: private, short, and swept when the process that made one was killed.

A folder belongs to whoever holds the lock on the file `lock` in it. A process that dies drops its lock, and a small process of each
folder's own (lapse/_sweep.py), which waits for just that, removes what is left. Should that one have been killed, too, the next process
of the same user that makes a folder does it.
"""
from __future__ import annotations

import fcntl
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

from lapse import _sweep
from lapse.errors import LapseError

PREFIX = "lapse-"
BASE_BYTES = 60     # a longer TMPDIR is not used: a socket's path may have about 100 bytes


class Folder:
    """A fresh folder that only this user may enter; `remove` ends it (not in a forked child)."""

    def __init__(self):
        base = tempfile.gettempdir()
        if len(base.encode()) > BASE_BYTES:
            base = "/tmp"
        _remove_left(Path(base))
        self._pid = os.getpid()
        self._lock: int | None = None
        try:
            self.path = tempfile.mkdtemp(prefix=PREFIX, dir=base)
            making = Path(self.path, "making")
            try:
                self._lock = os.open(making, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                fcntl.flock(self._lock, fcntl.LOCK_EX)
                making.rename(making.with_name("lock"))  # seen by others only once it is locked
            except OSError:
                shutil.rmtree(self.path, ignore_errors=True)
                raise
        except OSError as error:
            raise LapseError(f"cannot make a folder for ipc sockets in {base}: {error.strerror}") from None
        self._sweeper = _start_sweeper(self.path)

    def remove(self) -> None:
        if self._lock is not None and os.getpid() == self._pid:
            if self._sweeper is not None:       # first: it is not to see the name when that may be somebody else's
                self._sweeper.kill()
                self._sweeper.wait()
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = None


def _start_sweeper(path: str) -> subprocess.Popen | None:
    """The process that removes the folder if this one cannot; None where there is no Python to run it."""
    if not sys.executable:
        return None
    try:
        return subprocess.Popen([sys.executable, "-I", "-S", str(Path(_sweep.__file__).absolute()), path], stdin=subprocess.DEVNULL,
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/", start_new_session=True)
    except OSError:
        return None


def _remove_left(base: Path) -> None:
    """Remove the folders of this user's dead processes."""
    for path in base.glob(PREFIX + "*"):
        try:
            status = path.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
                continue
            lock = os.open(path / "lock", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # in use
        else:
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(lock)


def check(path: str) -> None:
    """Refuse a folder (LAPSE_IPC_DIR) that others could put sockets into."""
    try:
        status = Path(path).stat()
    except OSError as error:
        raise LapseError(f"LAPSE_IPC_DIR {path}: {error.strerror}") from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise LapseError(f"LAPSE_IPC_DIR {path} must be a folder that only its owner, this user, may enter (mode 0700)")
