"""Folders for ipc sockets: private, short, and swept when the process that made one was killed.

A folder belongs to whoever holds the lock on the file `lock` in it. A process that dies drops its lock, and the next one of the
same user that makes a folder removes what is left.
"""
from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from pathlib import Path

from lapse.errors import LapseError

PREFIX = "lapse-"
BASE_BYTES = 60     # a longer TMPDIR is not used: a socket's path may have about 100 bytes


class Folder:
    """A fresh folder that only this user may enter; `remove` ends it (not in a forked child)."""

    def __init__(self):
        base = tempfile.gettempdir()
        if len(base.encode()) > BASE_BYTES:
            base = "/tmp"
        _sweep(Path(base))
        self.path = tempfile.mkdtemp(prefix=PREFIX, dir=base)
        self._pid = os.getpid()
        making = Path(self.path, "making")
        self._lock: int | None = os.open(making, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        making.rename(making.with_name("lock"))  # seen by others only once it is locked

    def remove(self) -> None:
        if self._lock is not None and os.getpid() == self._pid:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = None


def _sweep(base: Path) -> None:
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
