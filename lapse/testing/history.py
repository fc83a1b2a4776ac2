"""Is a history of pulls, pushes and sets one that the guarantee allows? For the simulation and for real clusters.

Per key, Lapse promises sequential consistency (to synchronous and asynchronous operations), and linearizability to synchronous ones.
To make that cheap to check, value component w of every key belongs to worker w alone, and each push of worker w adds 1 to it. A pull
then sees one number per worker: how many of its pushes had been applied. For each key these vectors must obey

- own reads exact: a worker sees exactly the pushes that it issued before this pull;
- reads never go back: what a worker sees contains all it saw in earlier calls;
- a chain: of any two vectors, whoever saw them, one contains the other;
- real time: an operation sees every push that had finished before it began, nothing that began after it had finished, and at least
  what any pull saw that had finished before it began.

Keys that are set instead hold numbers that are written only once each; `check_registers` asks for one order of them that every worker's
program and real time agree with.

Sources: linearizability after Herlihy and Wing (1990), of counters whose increments commute and can be told apart, so that sorting is all
it takes; the register check is per-location coherence with known writers (Cantin, Lipasti, Smith, 2005), a search for cycles.
"""
from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np

WORKER, ORDER, KEY, BEGIN, END = range(5)
POSITION, REGISTER, IS_SET, VALUE, SET_BEGIN, SET_END = range(2, 8)     # columns of register accesses


class Finding(NamedTuple):
    """One thing that the guarantee does not allow; worker and order are those of the call that shows it, -1 where there is not just one."""
    rule: str
    key: int
    text: str
    worker: int = -1
    order: int = -1


class History(NamedTuple):
    """What workers did, one row per key of a call: columns worker, order of the call in its worker's program, key, begin, end
    (end is -1 where it is not known). `seen` has what each row of `reads` saw: a column per worker."""
    reads: np.ndarray
    seen: np.ndarray
    writes: np.ndarray

    def save(self, path) -> None:
        np.savez(path, reads=self.reads, seen=self.seen, writes=self.writes)

    @classmethod
    def load(cls, path) -> History:
        with np.load(path, allow_pickle=False) as arrays:
            return cls(arrays["reads"], arrays["seen"], arrays["writes"])

    @classmethod
    def joined(cls, histories) -> History:
        """The history of all workers out of the histories of some."""
        parts = list(histories)
        return cls(*(np.concatenate([part[i] for part in parts]) for i in range(3)))


class Recorder:
    """Keep the history of one worker of a real cluster.

    worker: its number among the num_workers of the whole job. Call `push` and `pull` just before the operation of that name is issued,
    and hand what they return to `finished` once it has finished. One thread per Recorder.
    """

    def __init__(self, worker: int, num_workers: int, clock=time.monotonic_ns):
        self.worker, self.num_workers, self.clock = worker, num_workers, clock
        self.order = 0
        self.pulls: list = []
        self.pushes: list = []

    def push(self, keys) -> list:
        """A push of 1 to this worker's own component of `keys` begins."""
        return self._begin(self.pushes, keys, None)

    def pull(self, keys, values) -> list:
        """A pull begins; `values` (one row per key) will hold what it saw when it has finished, and is copied then."""
        return self._begin(self.pulls, keys, values)

    def _begin(self, calls, keys, values) -> list:
        self.order += 1
        calls.append([self.order, np.array(keys, np.int64), self.clock(), -1, values])
        return calls[-1]

    def finished(self, call: list) -> None:
        call[3] = self.clock()
        if call[4] is not None:
            call[4] = np.array(call[4][:, :self.num_workers], np.int64)

    def history(self) -> History:
        """All finished pulls and all pushes so far."""
        pulls = [call for call in self.pulls if call[3] >= 0]
        seen = [call[4] for call in pulls]
        return History(self._rows(pulls), np.concatenate(seen) if seen else np.empty((0, self.num_workers), np.int64),
                       self._rows(self.pushes))

    def _rows(self, calls) -> np.ndarray:
        counts = [len(call[1]) for call in calls]
        rows = np.empty((sum(counts), 5), np.int64)
        if calls:
            rows[:, WORKER] = self.worker
            rows[:, KEY] = np.concatenate([call[1] for call in calls])
            for column, field in ((ORDER, 0), (BEGIN, 2), (END, 3)):
                rows[:, column] = np.repeat([call[field] for call in calls], counts)
        return rows


# --- counters -------------------------------------------------------------------------------------------------------------

def check(history: History, *, base=None, real_time: bool = True, limit: int = 5) -> list[Finding]:
    """What is wrong with a history; empty when nothing is.

    base: what each key held before the history began, an array of num_keys rows with a column per worker (default: zeros). real_time: check
    begin and end, too. limit: findings per rule. Real time is promised to synchronous operations only, and kept for all.
    """
    reads, seen, writes = history
    if len(reads) == 0:
        return []
    if base is not None:
        seen = seen - np.asarray(base)[reads[:, KEY], :seen.shape[1]]
    _, dense = np.unique(np.concatenate((reads[:, KEY], writes[:, KEY])), return_inverse=True)
    view = _View(history, seen, dense[:len(reads)], dense[len(reads):], limit)
    return view.own() + view.back() + view.chain() + (view.real_time() if real_time else [])


class _View:
    """The arrays of one check: keys and times numbered densely, so that pairs of them fit one integer."""

    def __init__(self, history, seen, read_key, write_key, limit):
        self.reads, self.seen, self.writes, self.limit = history.reads, seen, history.writes, limit
        self.read_key, self.write_key = read_key, write_key
        self.sums = seen.sum(axis=1)
        self.workers = seen.shape[1]

    def finding(self, rule: str, rows, text) -> list[Finding]:
        """Findings for the given rows of the reads; text(row) says what is wrong."""
        found = []
        for row in rows[:self.limit]:
            worker, order, key = (int(x) for x in self.reads[row, :3])
            saw = self.seen[row].tolist()
            found.append(Finding(rule, key, f"{rule}: call {order} of worker {worker} saw {saw} of key {key}, {text(row)}", worker, order))
        return found

    def compared(self, rule: str, bad, counts, what: str) -> list[Finding]:
        return self.finding(rule, np.flatnonzero(bad), lambda row: f"but {counts[row]} {what}")

    def own(self) -> list[Finding]:
        """Own reads exact."""
        span = int(max(self.reads[:, ORDER].max(), self.writes[:, ORDER].max(initial=0))) + 1
        pair = self.read_key * self.workers + self.reads[:, WORKER]
        issued = np.sort((self.write_key * self.workers + self.writes[:, WORKER]) * span + self.writes[:, ORDER])
        wanted = np.searchsorted(issued, pair * span + self.reads[:, ORDER]) - np.searchsorted(issued, pair * span)
        own = self.seen[np.arange(len(self.reads)), self.reads[:, WORKER]]
        return self.finding("own pushes", np.flatnonzero(own != wanted), lambda row: f"had issued {wanted[row]} pushes of its own before")

    def back(self) -> list[Finding]:
        """Reads never go back. Positions of one call have no order among each other."""
        rows = np.lexsort((self.sums, self.reads[:, ORDER], self.reads[:, WORKER], self.read_key))
        first, second = rows[:-1], rows[1:]
        same = ((self.read_key[first] == self.read_key[second]) & (self.reads[first, WORKER] == self.reads[second, WORKER])
                & (self.reads[first, ORDER] != self.reads[second, ORDER]))
        bad = np.flatnonzero(same & (self.seen[second] < self.seen[first]).any(axis=1))
        before = dict(zip(second[bad].tolist(), first[bad].tolist()))
        return self.finding("reads go back", second[bad], lambda row: f"after its call {self.reads[before[row], ORDER]} had seen "
                                                                      f"{self.seen[before[row]].tolist()}")

    def chain(self) -> list[Finding]:
        """Sorted by their sums, the vectors of a key must contain each other."""
        rows = np.lexsort((self.sums, self.read_key))
        first, second = rows[:-1], rows[1:]
        bad = np.flatnonzero((self.read_key[first] == self.read_key[second]) & (self.seen[second] < self.seen[first]).any(axis=1))
        other = dict(zip(second[bad].tolist(), first[bad].tolist()))
        return self.finding("no chain", second[bad], lambda row: f"and call {self.reads[other[row], ORDER]} of worker "
                            f"{self.reads[other[row], WORKER]} saw {self.seen[other[row]].tolist()}")

    def real_time(self) -> list[Finding]:
        known = self.reads[:, END] >= 0
        ended = self.writes[:, END] >= 0
        times, dense = np.unique(np.concatenate((self.reads[:, BEGIN], self.reads[:, END], self.writes[:, BEGIN], self.writes[:, END])),
                                 return_inverse=True)
        n, m, span = len(self.reads), len(self.writes), len(times) + 1
        begin, end, write_begin, write_end = dense[:n], dense[n:2 * n], dense[2 * n:2 * n + m], dense[2 * n + m:]
        pair = self.write_key * self.workers + self.writes[:, WORKER]
        finished = np.sort(pair[ended] * span + write_end[ended])
        begun = np.sort(pair * span + write_begin)
        found = []
        for worker in range(self.workers):
            start = (self.read_key * self.workers + worker) * span
            least = np.searchsorted(finished, start + begin) - np.searchsorted(finished, start)
            most = np.searchsorted(begun, start + end, side="right") - np.searchsorted(begun, start)
            component = self.seen[:, worker]
            found += self.compared("misses a finished push", component < least, least, f"pushes of worker {worker} had finished before it")
            found += self.compared("from the future", known & (component > most), most,
                                   f"pushes of worker {worker} had begun when it finished")
        # what any pull saw that finished before this one began: the largest sum will do, as the vectors are a chain
        rows = np.flatnonzero(known)
        rows = rows[np.lexsort((end[rows], self.read_key[rows]))]
        if len(rows):
            size = int(self.sums.max()) - int(min(self.sums.min(), 0)) + 1
            largest = np.maximum.accumulate(self.read_key[rows] * size + self.sums[rows])
            at = np.searchsorted(self.read_key[rows] * span + end[rows], self.read_key * span + begin) - 1
            bad = np.flatnonzero((at >= 0) & (self.read_key[rows[at]] == self.read_key) & (largest[at] > self.read_key * size + self.sums))
            found += self.finding("older than a finished pull", bad, lambda row: f"but a pull that saw {largest[at[row]] % size} pushes "
                                  "had finished before it began")
        return found[:4 * self.limit]


# --- registers --------------------------------------------------------------------------------------------------------------

def check_registers(accesses, *, limit: int = 5) -> list[Finding]:
    """What is wrong with the accesses of keys that are set: rows of worker, order, position in the call, key, 1 for a set and 0 for a
    pull, value, begin, end (-1: not known). Every set writes a number that no other set writes; keys begin as 0."""
    by_key: dict[int, list] = {}
    for row in np.asarray(accesses).tolist():
        by_key.setdefault(row[REGISTER], []).append(row)
    found = []
    for key in sorted(by_key):
        found += _check_register(key, by_key[key])
    return found[:limit]


def _check_register(key: int, rows: list) -> list[Finding]:
    writers = {row[VALUE]: row for row in rows if row[IS_SET]}
    for row in rows:
        value = row[VALUE]
        writer = writers.get(value)
        if row[IS_SET] or (value == 0 and writer is None):
            continue
        who = f"call {row[ORDER]} of worker {row[WORKER]} saw {value} of key {key}"
        if writer is None:
            return [Finding("never set", key, f"never set: {who}, which nobody has set", row[WORKER], row[ORDER])]
        if 0 <= row[SET_END] < writer[SET_BEGIN] or (row[WORKER] == writer[WORKER] and row[ORDER] < writer[ORDER]):
            later = f"call {writer[ORDER]} of worker {writer[WORKER]}"
            return [Finding("from the future", key, f"from the future: {who}, which {later} set later", row[WORKER], row[ORDER])]
    edges: dict = {0: {("value", value) for value in writers}}
    graph = {("value", row[VALUE]): set() for row in rows}
    graph["value", 0] = edges[0]
    _add_program_order(graph, rows)
    _add_real_time(graph, rows)
    for component in _strong_components(graph):
        values = sorted(node[1] for node in component if node[0] == "value")
        if len(values) > 1:
            return [Finding("no order", key, f"no order: the values {values} of key {key} would each have to be older than the others")]
    return []


def _add_program_order(graph, rows) -> None:
    """Each worker's calls, one after the other; sets of one call in the order of their positions, pulls of one call in none."""
    last: dict = {}
    calls: dict = {}
    for row in sorted(rows, key=lambda row: (row[WORKER], row[ORDER], row[POSITION])):
        calls.setdefault((row[WORKER], row[ORDER]), []).append(row)
    for (worker, _), call in calls.items():
        before = last.get(worker, ())
        if call[0][IS_SET]:
            for row in call:
                node = ("value", row[VALUE])
                for old in before:
                    graph[old].add(node)
                before = (node,)
            last[worker] = before
        else:
            nodes = {("value", row[VALUE]) for row in call}
            for old in before:
                graph[old] |= nodes
            last[worker] = nodes


def _add_real_time(graph, rows) -> None:
    """From each value to a moment after it was accessed, from moment to moment, and from there to the values accessed later."""
    begins = sorted({row[SET_BEGIN] for row in rows})
    for i in range(len(begins)):
        graph["time", i] = {("time", i + 1)} if i + 1 < len(begins) else set()
    places = {begin: i for i, begin in enumerate(begins)}
    begins = np.array(begins)
    after = np.searchsorted(begins, [row[SET_END] for row in rows], side="right").tolist()
    for row, place in zip(rows, after):
        graph["time", places[row[SET_BEGIN]]].add(("value", row[VALUE]))
        if row[SET_END] >= 0 and place < len(begins):
            graph["value", row[VALUE]].add(("time", place))


def _strong_components(graph):
    """Tarjan's strongly connected components, without recursion."""
    number: dict = {}
    low: dict = {}
    stack: list = []
    on_stack = set()
    for root in graph:
        if root in number:
            continue
        number[root] = low[root] = len(number)
        stack.append(root)
        on_stack.add(root)
        work = [(root, iter(graph[root]))]
        while work:
            node, rest = work[-1]
            for child in rest:
                if child not in number:
                    number[child] = low[child] = len(number)
                    stack.append(child)
                    on_stack.add(child)
                    work.append((child, iter(graph[child])))
                    break
                if child in on_stack:
                    low[node] = min(low[node], number[child])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == number[node]:
                    component = []
                    while True:
                        component.append(stack.pop())
                        on_stack.discard(component[-1])
                        if component[-1] == node:
                            break
                    yield component
