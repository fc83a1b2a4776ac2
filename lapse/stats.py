"""What a job did: per worker, per node, and in total.

Numbers come from the counters of `Protocol` and `Van`; each is written by one thread and read while it may change, so that a
`NodeStats` of a running node is exact only for what has finished. A position is one key of one call.
"""
from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path

KINDS = ("pulled", "pushed", "set", "localized")
SAMPLING = ("sampled", "sample_fallbacks", "sample_postponed", "pool_refills", "pool_waits")


@dataclass(frozen=True)
class Accesses:
    """Positions of one kind of operation, by where the key was found: here, on its way here, elsewhere."""

    local: int = 0
    queued: int = 0
    remote: int = 0

    @property
    def total(self) -> int:
        return self.local + self.queued + self.remote

    @property
    def local_share(self) -> float:
        """Between 0 and 1; 0 when there was no access."""
        return self.local / self.total if self.total else 0.0

    def __add__(self, other: Accesses) -> Accesses:
        return Accesses(self.local + other.local, self.queued + other.queued, self.remote + other.remote)


@dataclass(frozen=True)
class WorkerStats:
    """The operations of one worker slot."""

    pulled: Accesses = Accesses()
    pushed: Accesses = Accesses()
    set: Accesses = Accesses()
    localized: Accesses = Accesses()

    @classmethod
    def of(cls, counters: dict) -> WorkerStats:
        return cls(*(Accesses(*(counters[f"{kind}_{where}"] for where in ("local", "queued", "remote"))) for kind in KINDS))

    def __add__(self, other: WorkerStats) -> WorkerStats:
        return WorkerStats(*(getattr(self, kind) + getattr(other, kind) for kind in KINDS))


@dataclass(frozen=True)
class NodeStats:
    """One node, or (`JobStats.total`) all of them; times in seconds."""

    workers: tuple[WorkerStats, ...]
    pulled: Accesses
    pushed: Accesses
    set: Accesses
    localized: Accesses
    sampled: int                # draws handed out
    sample_fallbacks: int       # of them, those that the scheme could not serve: with "local", while nothing was local
    sample_postponed: int       # draws of the pool that went to the end of their sample, not being local
    pool_refills: int           # groups that came into the pool
    pool_waits: int             # how often a worker found the pool empty
    answered: int               # positions served for other nodes
    forwarded: int              # positions sent on because the key was not here
    long_ways: int              # operations forwarded more than 8 times
    relocated_in: int
    relocated_out: int
    relocation_count: int       # localizes whose time was taken
    relocation_min: float
    relocation_mean: float
    relocation_p99: float
    relocation_max: float
    sent_messages: int          # to other nodes
    sent_bytes: int
    received_messages: int      # also from this node itself
    received_bytes: int
    dropped: int                # frames of strangers
    refused: int                # connections of strangers

    @classmethod
    def of(cls, protocol: dict, van: dict) -> NodeStats:
        """From a node's counters: those of its `Protocol`, and those of its `Van` with the connections that were refused."""
        workers = tuple(WorkerStats.of(counters) for counters in protocol["workers"])
        every = sum(workers, WorkerStats.of(protocol["server"]))
        samples = {name: sum(worker[name] for worker in protocol["workers"]) for name in SAMPLING}
        times = {f"relocation_{name}": protocol[f"relocation_{name}_ns"] / 1e9 for name in ("min", "mean", "p99", "max")}
        counts = {name: protocol[name] for name in ("answered", "forwarded", "long_ways", "relocated_in", "relocated_out",
                                                    "relocation_count")}
        return cls(workers, every.pulled, every.pushed, every.set, every.localized, **samples, **counts, **times, **van)

    @classmethod
    def sum(cls, nodes: tuple[NodeStats, ...]) -> NodeStats:
        timed = [node for node in nodes if node.relocation_count]
        count = sum(node.relocation_count for node in timed)
        values = {f.name: sum((getattr(node, f.name) for node in nodes), Accesses() if f.name in KINDS else 0)
                  for f in fields(cls) if f.name != "workers" and not f.name.startswith("relocation_m")
                  and f.name != "relocation_p99"}
        return cls(workers=sum((node.workers for node in nodes), ()), **values,
                   relocation_min=min((node.relocation_min for node in timed), default=0.0),
                   relocation_mean=sum(n.relocation_mean * n.relocation_count for n in timed) / count if count else 0.0,
                   relocation_p99=max((node.relocation_p99 for node in timed), default=0.0),     # the slowest node's
                   relocation_max=max((node.relocation_max for node in timed), default=0.0))


@dataclass(frozen=True)
class JobStats:
    """All nodes, by rank."""

    nodes: tuple[NodeStats, ...]

    @property
    def total(self) -> NodeStats:
        return NodeStats.sum(self.nodes)

    def table(self) -> str:
        """A readable table: a row per node, and their sum."""
        sampling = self.total.sampled > 0
        head = ("node", "pulled", "local", "queued", "remote", "pushed", "local", "forwarded", "reloc. in", "mean ms", "p99 ms",
                "messages", "MB sent", *(("sampled", "fallbacks") if sampling else ()))
        rows = [head]
        named = [(str(rank), node) for rank, node in enumerate(self.nodes)]
        for name, n in [*named, ("all", self.total)] if len(named) > 1 else named:
            pulled = n.pulled
            shares = [f"{100 * part / pulled.total:.1f}%" if pulled.total else "-" for part in
                      (pulled.local, pulled.queued, pulled.remote)]
            pushed_local = f"{100 * n.pushed.local_share:.1f}%" if n.pushed.total else "-"
            rows.append((name, f"{pulled.total}", *shares, f"{n.pushed.total}", pushed_local, f"{n.forwarded}", f"{n.relocated_in}",
                         f"{n.relocation_mean * 1e3:.3f}", f"{n.relocation_p99 * 1e3:.3f}", f"{n.sent_messages}",
                         f"{n.sent_bytes / 1e6:.1f}", *((f"{n.sampled}", f"{n.sample_fallbacks}") if sampling else ())))
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)

    def write(self, folder: str | os.PathLike) -> Path:
        """Write `stats.json` into `folder` (made if missing); the file is there completely or not at all."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        path = Path(folder, "stats.json")
        with tempfile.NamedTemporaryFile("w", dir=folder, prefix=".stats", delete=False) as file:
            try:
                json.dump({"job": asdict(self.total), "nodes": [asdict(node) for node in self.nodes]}, file, indent=1)
                file.flush()
                Path(file.name).chmod(0o644)
                os.replace(file.name, path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
        return path


def keys_to_trace(text: str, num_keys: int) -> list[int] | range:
    """The keys that a trace setting names: "12,3421", "all", "random-10-seed-7-range-0-100" (10 of [0, 100)).

    ValueError when the text says something else; KeyRangeError for keys that do not exist.
    """
    from lapse.errors import KeyRangeError
    words = text.split("-")
    if text == "all":
        return range(num_keys)
    if len(words) == 7 and words[0::2][:1] == ["random"] and words[2] == "seed" and words[4] == "range":
        import random
        count, seed, low, high = (int(words[i]) for i in (1, 3, 5, 6))
        if not 0 <= low < high <= num_keys:
            raise KeyRangeError(f"trace_keys: [{low}, {high}) is not in [0, {num_keys})")
        return sorted(random.Random(seed).sample(range(low, high), min(count, high - low)))
    try:
        keys = [int(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"trace_keys is 12,3421 or all or random-10-seed-7-range-0-100, not {text!r}") from None
    for key in keys:
        if not 0 <= key < num_keys:
            raise KeyRangeError.of(key, num_keys)
    return keys
