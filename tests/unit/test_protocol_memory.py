"""One node in the build of `make mutants`, in which any allocation can be made to fail: what is said, and what is left."""
import ctypes

import numpy as np
import pytest
from test_protocol import ACK, HAND_OVER, LOCALIZE, PULL, PUSH, SET, TRANSFER, VALUES, message, probe
from test_protocol_edges import ERR_MEMORY, FRAMES, KEYS, NO_MEMORY, allocated, arrived, bare, coming, mixed, own, queued

__all__ = ["probe"]             # the fixture


def the_allocation_that_fails():
    """Its number, counted from now on, among those of the core: `make mutants` builds that in. None elsewhere."""
    try:
        return ctypes.c_int.in_dll(ctypes.CDLL(None), "lapse_fails_at")
    except ValueError:
        return None


FAILS = the_allocation_that_fails()
if FAILS is None:
    pytest.skip("only the build of `make mutants` has allocations that fail", allow_module_level=True)


def each_failing(build, act):
    """Call act(build()) again and again, each time with another allocation that fails: (what comes back, what was built) of those calls."""
    for i in range(1, 200):
        node = build()
        FAILS.value = i
        rc = act(node)
        failed, FAILS.value = FAILS.value == 0, 0
        if not failed:
            assert rc == 0
            return
        yield rc, node


FAILING = {
    **FRAMES,
    "many keys to serve": (bare, message(PULL, range(KEYS)), 1),
    "many keys to forward": (bare, message(PULL, range(KEYS, 2 * KEYS)), 1),
    "localize of many": (bare, message(LOCALIZE, range(KEYS)), 1),
    "localize of some": (bare, message(LOCALIZE, range(12)), 1),
    "hand-over of many": (arrived, message(HAND_OVER, range(KEYS, 2 * KEYS), [2] * KEYS, origin=2), 1),
    "transfer of many": (coming, message(TRANSFER, range(KEYS, 2 * KEYS), [1] * KEYS, bytes(8 * KEYS), origin=0), 1),
    "first row, pushed": (bare, message(PUSH, [1], values=bytes(8)), 1),
    "first row, set": (bare, message(SET, [1], values=bytes(8)), 1),
    "first row, in part": (bare, message(PUSH, [1, KEYS], values=bytes(16)), 1),
    "first row, own push": (own, message(PUSH, [1], values=bytes(8), hops=1, origin=0), 1),
    "first row, arrived": (coming, message(TRANSFER, [KEYS], [1], bytes(8), origin=0), 1),
    "queued": (coming, message(PUSH, [KEYS], values=bytes(8)), 1),
    "many answers": (lambda probe: queued(probe, False, 40), message(TRANSFER, [KEYS], [1], bytes(8), origin=0), 1),
    "many answers, passed on": (lambda probe: queued(probe, True, 40), message(TRANSFER, [KEYS], [1], bytes(8), origin=0), 1),
}


@pytest.mark.parametrize("case", FAILING)
def test_a_message_without_memory(probe, case):
    """The violation says so; no latch, no lock, and no message is left behind, and what was freed is not used any more."""
    build, frame, src = FAILING[case]
    found = list(each_failing(lambda: build(probe), lambda node: node.handle(frame, src)))
    assert found or case in FRAMES
    for rc, node in found:
        assert rc == NO_MEMORY
        assert (node.sink.unsent, node.sink.locked, node.latched()) == (0, 0, 0)
        assert node.handle(message(PULL, [2 * KEYS]), 1) == 0
        assert node.handle(message(LOCALIZE, range(50, 60), origin=2), 2) == 0


@pytest.mark.parametrize(("build", "kind", "keys"), [
    (mixed, PULL, [KEYS, KEYS + 1]), (bare, PUSH, range(KEYS, KEYS + 100)), (bare, PUSH, [1]), (bare, PUSH, [1, KEYS]),
    (bare, SET, [KEYS, KEYS + 1, KEYS]), (bare, LOCALIZE, [KEYS]), (coming, PUSH, [KEYS])])
def test_an_operation_without_memory(probe, build, kind, keys):
    found = list(each_failing(lambda: build(probe), lambda node: node.issued(kind, np.array(keys), np.zeros(300, np.float32))[0]))
    assert found
    for rc, node in found:
        assert rc == ERR_MEMORY
        assert (node.sink.unsent, node.sink.locked, node.latched()) == (0, 0, 0)


@pytest.mark.parametrize("build", [bare, mixed])
@pytest.mark.parametrize("kind", [PULL, SET])
@pytest.mark.parametrize("few", [1, 9])
def test_a_smaller_operation_after_one_without_memory(probe, build, kind, few):
    """All in the same place of the ring. What was given back for a larger piece of memory is not there any more."""
    def prepared():
        node = probe.Probe(3 * KEYS, 0, 3, dtype="float32", visible=2, credit=1) if build is bare else probe.Probe(
            3 * KEYS, 0, 3, dtype="float32", visible=np.full(3 * KEYS, 2, np.uint32), credit=1)
        complete(node, 9)
        return node

    def complete(node, n):
        ts = node.issue(kind, np.arange(KEYS, KEYS + n), np.zeros(2 * n, np.float32))
        assert node.handle(message(VALUES if kind == PULL else ACK, range(KEYS, KEYS + n), values=bytes(8 * n) if kind == PULL else b"",
                                   origin=0, ts=ts), 1) == 0
        assert node.finished(ts)

    for rc, node in each_failing(prepared, lambda node: node.issued(kind, np.arange(KEYS, KEYS + 60), np.zeros(120, np.float32))[0]):
        assert rc == ERR_MEMORY
        complete(node, few)


def test_a_node_without_memory(probe):
    """No node comes of it, and nothing is left of what there was."""
    for i in range(1, 200):
        for turn in range(300):
            if turn == 100:
                before = allocated()
            FAILS.value = i
            try:
                probe.Probe(64, 0, 2, location_caches=True, visible=np.full(64, 2, np.uint32), credit=64)
                failed = False
            except MemoryError:
                failed = True
            assert failed == (FAILS.value == 0)
            FAILS.value = 0
            if not failed:
                assert i > 10
                return
        assert allocated() - before < 200 * 48      # the smallest thing that is allocated
