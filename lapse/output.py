"""What the nodes write, on its way out of the launcher: in a thread of its own, so that a reader who does not read holds up the nodes'
output, but neither signals nor the end of the job.
"""
from __future__ import annotations

import select
import threading
import time
from collections import deque
from collections.abc import Callable

LIMIT = 1 << 20         # bytes that may wait; whoever writes is to look at `full`
PATIENCE = 1.0          # seconds for the rest, when the job was interrupted


class Output:
    """Writes to several targets, one after the other. One that fails gets nothing more; `errors` tells why."""

    def __init__(self, wake: Callable[[], None]):
        self._wake = wake               # called when there may be something new in `full` or `errors`
        self._changed = threading.Condition()       # guards all below
        self._waiting: deque = deque()  # (target, bytes)
        self._size = 0                  # of what waits and of what is being written
        self._broken: dict = {}         # by id: target and error
        self._told = 0
        self._over = False
        self._thread = threading.Thread(target=self._run, name="lapse-output", daemon=True)
        self._thread.start()

    def to(self, target) -> Sink:
        return Sink(self, target)

    @property
    def full(self) -> bool:
        return self._size > LIMIT

    def put(self, target, data: bytes) -> None:
        """Never blocks."""
        with self._changed:
            if id(target) not in self._broken:
                self._waiting.append((target, data))
                self._size += len(data)
                self._changed.notify_all()

    def errors(self) -> list[Exception]:
        """Those that have not been told yet."""
        with self._changed:
            new = [error for _, error in self._broken.values()][self._told:]
            self._told += len(new)
        return new

    def close(self, interrupted: Callable[[], bool]) -> None:
        """Wait until all has been written; once `interrupted()`, not for long."""
        end = None
        with self._changed:
            while self._size and (end is None or time.monotonic() < end):
                self._changed.wait(0.05)
                if end is None and interrupted():
                    end = time.monotonic() + PATIENCE
            self._over = True
            finished = not self._size
            self._changed.notify_all()
        if finished:
            self._thread.join()         # else it sits in a write that nobody reads, and holds no lock

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    if self._over:
                        return
                    self._changed.wait()
                target, data = self._waiting.popleft()
                broken = id(target) in self._broken
            error = None
            if not broken:
                try:
                    target.write(data)
                    target.flush()
                except Exception as caught:
                    error = caught
            with self._changed:
                self._size -= len(data)
                if error is not None:
                    self._broken[id(target)] = target, error
                self._changed.notify_all()
                if not self._over:
                    self._wake()


class Sink:
    """One target of an Output."""

    def __init__(self, output: Output, target):
        self._output, self._target = output, target

    def write(self, data: bytes) -> None:
        self._output.put(self._target, data)


# -- targets

class Nowhere:
    def write(self, data: bytes) -> None:
        pass

    def flush(self) -> None:
        pass


class _Raw:
    """A file below its buffer: a write that never ends would hold the buffer's lock, which Python wants when it exits."""

    def __init__(self, raw):
        self._raw = raw

    def write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            written = self._raw.write(rest)
            if written is None:         # whoever shares the terminal has made it non-blocking
                select.select([], [self._raw], [])
            else:
                rest = rest[written:]

    def flush(self) -> None:
        pass


class _Text:
    """Bytes into a stream that takes text only (a notebook's)."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, data: bytes) -> None:
        self._stream.write(data.decode(errors="replace"))

    def flush(self) -> None:
        self._stream.flush()


def target_of(given, default):
    """Where to write: what the caller has given, else sys.stdout or sys.stderr, which may be anything, or nothing."""
    if given is not None:
        return given
    if default is None:
        return Nowhere()
    default.flush()
    buffer = getattr(default, "buffer", None)
    raw = getattr(buffer, "raw", None)
    return _Raw(raw) if hasattr(raw, "fileno") else buffer or _Text(default)
