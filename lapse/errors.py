"""What Lapse raises. Every class also derives from the built-in exception that a caller would look for."""
from __future__ import annotations


class LapseError(Exception):
    """Anything that Lapse itself finds wrong: the base class of all others."""


class KeyRangeError(LapseError, ValueError, IndexError):
    """A key below 0, or from num_keys on."""

    @classmethod
    def of(cls, key: int, num_keys: int) -> KeyRangeError:
        return cls(f"key {key} is not in [0, {num_keys})")


class Interrupted(LapseError, RuntimeError):
    """Ctrl-C ended the operation that this thread waited for; the main thread got the KeyboardInterrupt."""


class NodeFailure(LapseError, RuntimeError):
    """A node died, went silent or broke the protocol, and the job is over.

    All nodes get the same root cause: `rank` (None: not a node, or nobody knows which), `host`, `pid`, `cause` and
    `noticed_by`.
    """

    def __init__(self, rank: int | None, host: str, pid: int, cause: str, noticed_by: str):
        super().__init__(failure_text(rank, host, pid, cause, noticed_by))
        self.rank = rank
        self.host = host
        self.pid = pid
        self.cause = cause
        self.noticed_by = noticed_by

    def __reduce__(self):
        return type(self), (self.rank, self.host, self.pid, self.cause, self.noticed_by)


class WorkerError(LapseError, RuntimeError):
    """An exception that a worker function raised in a process of `lapse.launch`; `node`, `worker` and `traceback` (text)."""

    def __init__(self, node: int, worker: int | None, summary: str, traceback: str):
        where = f"node {node}" if worker is None else f"worker {worker} of node {node}"
        super().__init__(f"{where}: {summary}\n\n{traceback}".rstrip())
        self.node = node
        self.worker = worker
        self.summary = summary
        self.traceback = traceback

    def __reduce__(self):
        return type(self), (self.node, self.worker, self.summary, self.traceback)


def failure_text(rank: int | None, host: str, pid: int, cause: str, noticed_by: str) -> str:
    """Say in one line who failed, where, why and who noticed."""
    where = ", ".join(part for part in (host, f"pid {pid}" if pid else "") if part)
    who = "the job failed" if rank is None else f"node {rank}"
    if where:
        who += f" ({where})"
    return f"{who}: {cause}" + (f"; noticed by {noticed_by}" if noticed_by else "")
