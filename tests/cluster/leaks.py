"""Memory stays flat: each kind of operation many times, on one node or two, from Python and at C level, with looks at what is in use.

Looked at, always when nothing is under way: bytes in use of malloc (mallinfo2), blocks in use of Python's allocator, objects of the garbage
collector, resident memory (in long runs: pages are coarse). A kind runs a quarter of its operations to warm up, then nine slices, with a
look after each. The least of the last three looks may be above the greatest of the first three by a quarter of a byte and a thousandth of
an object per operation, beyond some noise: the smallest thing that an operation can leave behind has 16 bytes.

    python tests/cluster/leaks.py                                          one node
    python -m lapse run -s 2 python tests/cluster/leaks.py -n 1000000      10^6 operations of every kind
"""
import asyncio
import contextlib
import ctypes
import gc
import logging
import os
import sys
import time
from pathlib import Path

import numpy as np

import lapse
from lapse.options import positive_int, program_parser, system_settings
from lapse.program import run_program

try:
    import torch
except ImportError:
    torch = None            # then there are no tensors to look at

LENGTH = 8
SHARED = 16                 # keys that both nodes move
KEYS = 400
SLICES = 9
SCHEMES = ("naive", "preloc", "pool", "local")
NOISE_BYTES, NOISE_BLOCKS, NOISE_RESIDENT = 48 << 10, 300, 1 << 20
NOISE_POOL = 512 << 10      # bytes of a pool, which holds more or less as it is asked for
PER_OPERATION_BYTES, PER_OPERATION_BLOCKS = 0.25, 0.001


class Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
                                                     "fordblks", "keepcost")]


class Looks:
    """What is in use, as often as one looks."""

    def __init__(self):
        self.info = getattr(ctypes.CDLL(None), "mallinfo2", None)
        if self.info is not None:
            self.info.restype = Mallinfo
        self.page = os.sysconf("SC_PAGESIZE")

    def look(self):
        """(bytes of malloc, Python's blocks, tracked objects, resident bytes); numbers that are not to be had are 0."""
        gc.collect()
        info = self.info() if self.info is not None else None
        used = info.uordblks + info.hblkhd if info is not None else 0
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * self.page
        return used, sys.getallocatedblocks(), len(gc.get_objects()), resident


def growth(looks):
    """How much more there is at the end: the least of the last three looks over the greatest of the first three."""
    return [min(column[-3:]) - max(column[:3]) for column in zip(*looks)]


def verdict(looks, operations, resident_too, noise):
    """What grows, in words; "" for nothing. operations: between the middle of the first three looks and that of the last three."""
    used, blocks, objects, resident = growth(looks)
    wrong = []
    if used > noise + PER_OPERATION_BYTES * operations:
        wrong.append(f"{used} bytes of malloc")
    if blocks > NOISE_BLOCKS + PER_OPERATION_BLOCKS * operations:
        wrong.append(f"{blocks} blocks of Python's")
    if objects > NOISE_BLOCKS + PER_OPERATION_BLOCKS * operations:
        wrong.append(f"{objects} objects")
    if resident_too and resident > NOISE_RESIDENT + PER_OPERATION_BYTES * operations:
        wrong.append(f"{resident} resident bytes")
    return ", ".join(wrong)


# --- the kinds: each is called with a number of operations, does about as many, and leaves nothing under way ----------------------------

class Kinds:
    """What one node does; `meet` waits for the others."""

    def __init__(self, server, kv, scheme):
        self.server, self.kv, self.scheme = server, kv, scheme
        rank, nodes = server.my_rank(), server.num_nodes
        per_home = -(-KEYS // nodes)
        self.here = np.arange(rank * per_home + SHARED, rank * per_home + SHARED + 8)      # never moved
        other = (rank + 1) % nodes
        self.there = np.arange(other * per_home + SHARED, other * per_home + SHARED + 8)
        self.shared = np.arange(SHARED)
        self.ones = np.ones((8, LENGTH), np.float32)
        self.out = np.empty((8, LENGTH), np.float32)
        self.error = None

    def meet(self):
        self.kv.waitall()
        self.kv.barrier()

    def all(self):
        """{name: (function, share of the operations)}; expensive kinds do fewer."""
        kinds = {
            "pull here": (self.pull_here, 1), "push here": (self.push_here, 1), "set here": (self.set_here, 1),
            "pull there": (self.pull_there, 1), "push there": (self.push_there, 1), "set there": (self.set_there, 1),
            "asynchronous, waited for": (self.asynchronous, 1), "asynchronous, waitall": (self.wait_for_all, 1),
            "pull without vals": (self.pull_new, 1), "timestamps dropped": (self.dropped_timestamps, 1), "asyncio": (self.asyncio, 0.1),
            "localize back and forth": (self.localize, 1), "pull_if_local": (self.pull_if_local, 1), "questions": (self.questions, 1),
            "barrier": (self.barriers, 0.02), "Worker, finalized": (self.finalized, 0.01),
            "Worker, dropped": (self.dropped, 0.01), "rejected": (self.rejected, 1),
        }
        import _memory
        kinds |= {f"C {name} {where}": (self.at_c_level(name, keys), 1) for name in ("pull", "push", "set", "pull_if_local", "asynchronous")
                  for where, keys in (("here", self.here), ("there", self.there))}
        kinds |= {"C localize back and forth": (self.at_c_level("localize", self.shared[8:]), 1),
                  "C acquire and release": (self.at_c_level("acquire", self.here), 1),
                  "C rejected": (self.at_c_level("rejected", self.here), 1)}
        assert {name.split()[1] for name in kinds if name.startswith("C ")} | {"sample"} == set(_memory.KINDS)
        return kinds

    def sampling(self):
        kinds = {f"sample, {self.scheme}": (self.sample, 1), f"C sample, {self.scheme}": (self.at_c_level("sample", self.here), 1),
                f"sample given up, {self.scheme}": (self.given_up, 1), f"rejected sample, {self.scheme}": (self.rejected_sample, 1)}
        if self.scheme == "pool" and torch is not None:
            kinds["tensors"] = (self.tensors, 1)
        return kinds

    def pull_here(self, n):
        for _ in range(n):
            self.kv.pull(self.here, self.out)

    def push_here(self, n):
        for _ in range(n):
            self.kv.push(self.here, self.ones)

    def set_here(self, n):
        for _ in range(n):
            self.kv.set(self.here, self.ones)

    def pull_there(self, n):
        for _ in range(n):
            self.kv.pull(self.there, self.out)

    def push_there(self, n):
        for _ in range(n):
            self.kv.push(self.there, self.ones)

    def set_there(self, n):
        for _ in range(n):
            self.kv.set(self.there, self.ones)

    def asynchronous(self, n):
        for _ in range(n // 3):
            stamps = [self.kv.push(self.there, self.ones, True), self.kv.pull(self.there, self.out, True),
                      self.kv.set(self.there[:1], self.ones[:1], **{"async": True})]
            for ts in stamps:
                self.kv.wait(ts)

    def wait_for_all(self, n):
        for _ in range(n // 50):
            for _ in range(25):
                self.kv.push(self.there, self.ones, True)
                self.kv.pull(self.there, np.empty((8, LENGTH), np.float32), True)
            self.kv.waitall()

    def pull_new(self, n):
        for _ in range(n // 2):
            self.kv.pull(self.there)
            self.kv.pull(self.there, asynchronous=True).result()

    def dropped_timestamps(self, n):
        for _ in range(n // 10):
            for _ in range(10):
                self.kv.pull(self.there, asynchronous=True)
        self.kv.waitall()

    def asyncio(self, n):
        async def run():
            for _ in range(n // 2):
                await asyncio.gather(self.pulled(), self.pulled())
        asyncio.run(run())

    async def pulled(self):
        return await self.kv.pull(self.there, asynchronous=True)

    def localize(self, n):
        for _ in range(n // 4):             # the others wait in the queues of the keys, which the other node wants, too
            keys = self.shared[:8]
            self.kv.localize(keys, True)
            self.kv.push(keys, self.ones, True)
            self.kv.pull(keys, self.out, True)
            self.kv.set(keys, self.ones, True)
            self.kv.waitall()

    def pull_if_local(self, n):
        for _ in range(n // 2):
            self.kv.pull_if_local(self.here, self.out)
            self.kv.pull_if_local(self.there, self.out)

    def questions(self, n):
        for _ in range(n // 5):
            self.kv.is_local(3)
            self.kv.get_key_size(3)
            self.server.is_local(self.shared)
            self.server.owner(self.shared)
            self.server.stats()

    def tensors(self, n):
        ones, out, keys = torch.ones(8, LENGTH), torch.empty(8, LENGTH), torch.from_numpy(self.there)
        for _ in range(n // 4):
            self.kv.push(keys, ones)
            self.kv.pull(keys, out)
            self.kv.push(keys, ones, True)
            self.kv.wait(self.kv.pull(keys, out, True))

    def barriers(self, n):
        for _ in range(n):
            self.kv.barrier()

    def finalized(self, n):
        for _ in range(n):
            self.kv.pull(self.there, asynchronous=True)
            self.kv.finalize()
            self.kv = lapse.Worker(0, self.server)

    def dropped(self, n):
        for _ in range(n):
            kv = lapse.Worker(1, self.server)
            kv.pull(self.there, asynchronous=True)
            kv = None
        while self.server._node.orphans:
            time.sleep(0.01)

    def at_c_level(self, kind, keys):
        import _memory
        share = {"localize": 4, "asynchronous": 4, "sample": 2, "rejected": 4}.get(kind, 1)
        return lambda n: _memory.run(self.kv, kind, keys, n // share, LENGTH)

    def sample(self, n):
        out, keys = np.empty((4, LENGTH), np.float32), np.empty(4, np.int64)
        for _ in range(n // 2):
            handle = self.kv.prepare_sample(8)
            self.kv.pull_sample(handle, keys, out)
            self.kv.wait(self.kv.pull_sample(handle, keys, out, True))

    def given_up(self, n):
        for _ in range(n):
            self.kv.finish_sample(self.kv.prepare_sample(8))

    def rejected_sample(self, n):
        out, keys = np.empty((4, LENGTH), np.float32), np.empty(4, np.int64)
        for _ in range(n // 4):
            handle = self.kv.prepare_sample(2)
            for call in (lambda handle=handle: self.kv.pull_sample(handle, keys, out), lambda: self.kv.pull_sample(12345678, keys, out),
                         lambda handle=handle: self.kv.pull_sample(handle, keys, out[:2]), lambda: self.kv.prepare_sample(-1)):
                with contextlib.suppress(ValueError):
                    call()
                    raise AssertionError("it should have been rejected")
            self.kv.finish_sample(handle)

    def rejected(self, n):
        kv, keys, ones = self.kv, self.there, self.ones
        calls = [lambda: kv.pull([KEYS], self.out[:1]), lambda: kv.push(keys, ones[:3]), lambda: kv.set([-1], ones[:1], True),
                 lambda: kv.push(keys, ones.astype(np.float64), True), lambda: kv.localize([0, KEYS + 5], True), lambda: kv.pull("keys"),
                 lambda: kv.wait(1 << 40), lambda: kv.pull(keys, None, nothing=True), lambda: kv.pull([[0]], self.out),
                 lambda: lapse.Worker(0, None)]
        for _ in range(n // len(calls)):
            for call in calls:
                with contextlib.suppress(ValueError, TypeError, IndexError):
                    call()
                    raise AssertionError("it should have been rejected")


# --- lives -------------------------------------------------------------------------------------------------------------------------------

def failing(rng, n):
    raise ZeroDivisionError("no draws today")


def lives(n):
    """A node that is set up and shut down, and one that fails with operations under way: n of both, in one process without a cluster."""
    for i in range(n):
        lapse.setup(50, 2, shared_memory=bool(i & 1))
        server = lapse.Server(LENGTH)
        server.enable_sampling_support(SCHEMES[i % 4], distribution=failing if i % 8 > 3 else "uniform", min=0, max=50)
        kv = lapse.Worker(0, server)
        for _ in range(20):
            kv.push(np.arange(50), np.ones((50, LENGTH), np.float32), True)
            kv.pull(np.arange(50), asynchronous=True)
        with contextlib.suppress(ZeroDivisionError, RuntimeError):
            kv.pull_sample(kv.prepare_sample(4), np.empty(4, np.int64), np.empty((4, LENGTH), np.float32), timeout=5)
        if i % 3:
            kv.waitall()
            kv = None
            server.shutdown()
        else:
            server._cluster.fail("enough")
            try:
                for _ in range(1000):
                    kv.pull([1])
            except lapse.NodeFailure:
                pass
            else:
                raise AssertionError("the node should have failed")
            server._node.abandon("it has failed")
        kv = server = None


# --- the run -----------------------------------------------------------------------------------------------------------------------------

def measure(name, function, operations, meet, looks, resident_too):
    """Run a kind, print its line, and return what grows."""
    each = max(operations // (SLICES + 3), 1)
    start = time.monotonic()
    function(3 * each)
    seen = []
    for _ in range(SLICES):
        function(each)
        meet()
        seen.append(looks.look())
        meet()
    between = (SLICES - 3) * each
    wrong = verdict(seen, between, resident_too, NOISE_POOL if "pool" in name else NOISE_BYTES)
    used, blocks, objects, resident = growth(seen)
    print(f"{name:32} {(SLICES + 3) * each:9} operations  {used / between:8.3f} bytes  {blocks / between:8.4f} blocks  "
          f"{objects / between:8.4f} objects each, {resident / 1024:7.0f} KiB resident  {time.monotonic() - start:6.1f} s"
          + (f"  WRONG: {wrong}" if wrong else ""), flush=True)
    return wrong


def run(args):
    looks, wrong, kinds = Looks(), [], 0
    logging.getLogger("lapse").setLevel(logging.CRITICAL)
    gc.freeze()                                         # what is here already is not to be looked at each time
    resident_too = args.operations >= 100_000

    def all_of(named, meet):
        nonlocal kinds
        for name, (function, share) in named.items():
            if args.only is None or args.only in name:
                kinds += 1
                found = measure(name, function, max(int(args.operations * share), SLICES + 3), meet, looks, resident_too)
                if found:
                    wrong.append(f"{name}: {found}")

    rank, nodes = 0, 1
    for scheme in SCHEMES:                              # a job has one node life per process: alone, one life per scheme
        lapse.setup(KEYS, 2, **system_settings(args))
        if lapse.is_scheduler():
            lapse.scheduler(KEYS, 2)
            return 0
        server = lapse.Server(LENGTH)
        rank, nodes = server.my_rank(), server.num_nodes
        chosen = args.scheme if nodes > 1 else scheme
        server.enable_sampling_support(chosen, seed=1)
        named = Kinds(server, lapse.Worker(0, server), chosen)
        lapse.Worker(1, server)                         # dropped at once: its slot counts as arrived until there is a Worker again
        if scheme == SCHEMES[0]:
            all_of(named.all(), named.meet)
        all_of(named.sampling(), named.meet)
        named.kv.finalize()
        named = None
        server.shutdown()
        server = None
        if nodes > 1:
            break
    if nodes == 1:
        all_of({"lives": (lives, 0.002)}, lambda: None)
    print(f"node {rank} leaks: {'WRONG' if wrong else 'OK'} ({nodes} nodes, {kinds} kinds, {len(wrong)} grow)", flush=True)
    for line in wrong:
        print(f"node {rank} WRONG: {line}", flush=True)
    return 1 if wrong or not kinds else 0


def main():
    parser = program_parser("leaks", "Run each kind of operation many times, and see that the memory stays flat.")
    parser.add_argument("-n", "--operations", type=positive_int, default=10_000, metavar="N",
                        help="operations of each kind, fewer of the expensive ones (default: %(default)s)")
    parser.add_argument("--only", metavar="TEXT", help="kinds whose name has this in it")
    parser.add_argument("--scheme", choices=SCHEMES, default="pool", help="of sampling, on more than one node (default: %(default)s)")
    return run(parser.parse_args())


if __name__ == "__main__":
    run_program(main)
