"""One node at its edges: sizes, memory that ends, a home that contradicts itself, two threads that meet in one call."""
import ctypes
import sys
from pathlib import Path

import numpy as np
import pytest
from test_protocol import (
    ACK,
    BAD_ANSWER,
    BAD_EPOCH,
    BAD_SIZE,
    FRAME,
    HAND_OVER,
    HEADER,
    LOCALIZE,
    NOT_HERE,
    PULL,
    PUSH,
    SECOND_NEXT,
    TRANSFER,
    VALUES,
    header,
    message,
    probe,
)

__all__ = ["probe"]             # the fixture

NO_MEMORY, SEND_FAILED, ERR_FAILED, ERR_MEMORY = -112, -113, -3, -7
EMPTY = np.empty(0)


def pages():
    """What this process has mapped."""
    return int(Path("/proc/self/statm").read_text().split()[0])


class Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
                                                     "fordblks", "keepcost")]


def allocated():
    """Bytes in use of malloc; 0 where the C library does not tell."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        return 0
    mallinfo.restype = Mallinfo
    info = mallinfo()
    return info.uordblks + info.hblkhd


def sanitized():
    """A sanitizer has mapped more than there is, and keeps what is freed."""
    return pages() > 1 << 28


needs_statm = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's record of its mappings")


def pull(node, keys, numbers=None, **more):
    return node.issue(PULL, np.array(keys), np.zeros(2 * len(keys) if numbers is None else numbers, np.float32), **more)


# --- sizes

def test_a_value_larger_than_a_frame_goes_alone(probe):
    large = 5 << 20             # 20 MB
    node = probe.Probe(4, 0, 2, dtype="float32", visible=large)
    node.issue(PUSH, np.array([2, 3]), np.zeros(2 * large, np.float32))
    assert [(header(sent)[4], len(sent)) for _, sent in node.sink.sent] == [(1, HEADER + 16 + 4 * large)] * 2
    node.sink.sent.clear()
    for kind, answer in ((PULL, VALUES), (LOCALIZE, TRANSFER)):
        assert node.handle(message(kind, [0, 1]), 1) == BAD_SIZE
        assert node.handle(message(kind, [0]), 1) == 0
        assert [(header(sent)[0], len(sent)) for _, sent in node.sink.sent] == [(answer, HEADER + 16 + 4 * large)]
        node.sink.sent.clear()


@pytest.mark.parametrize("kind", [LOCALIZE, HAND_OVER])
def test_what_is_relocated_is_measured_by_what_is_stored(probe, kind):
    """16 keys of half a mebibyte to see, and one to move."""
    node = probe.Probe(64, 0, 2, dtype="float32", visible=1 << 17, stored=1 << 18)
    assert node.handle(message(kind, range(16)), 1) == BAD_SIZE
    assert node.handle(message(PULL, range(16)), 1) == 0


def test_many_positions_of_one_operation_wait_for_a_key(probe):
    node = probe.Probe(4, 0, 2, dtype="float32", visible=1)
    node.issue(LOCALIZE, np.array([2]), EMPTY)
    assert node.handle(message(PULL, [2] * 100, range(100, 200)), 1) == 0
    node.sink.sent.clear()
    assert node.handle(message(TRANSFER, [2], [1], np.float32(9).tobytes(), origin=0), 1) == 0
    (dest, answer), = node.sink.sent
    assert dest == 1
    assert np.frombuffer(answer, np.int64, 100, HEADER).tolist() == [2] * 100
    assert np.frombuffer(answer, np.uint32, 100, HEADER + 800).tolist() == list(range(100, 200))
    assert np.frombuffer(answer, np.float32, 100, HEADER + 1200).tolist() == [9] * 100


def test_a_message_for_many_nodes(probe):
    node = probe.Probe(400, 0, 400, dtype="float32", visible=1)
    assert node.handle(message(PULL, range(1, 400)), 1) == 0
    assert [(dest, sent[HEADER:HEADER + 8]) for dest, sent in node.sink.sent] == [(i, i.to_bytes(8, "little")) for i in range(1, 400)]


@pytest.mark.parametrize("n", [63, 64, 65, 128])
def test_offsets_of_as_many_values_as_there_is_room_for(probe, n):
    lengths = np.arange(256, dtype=np.uint32) % 3 + 1
    for _ in range(20):         # (what lies behind them is looked at when it is given back)
        node = probe.Probe(256, 0, 2, dtype="float32", visible=lengths, stored=lengths)
        values = np.arange(lengths[:n].sum(), dtype=np.float32)
        assert node.handle(message(PUSH, range(n), values=values.tobytes()), 1) == 0
        assert node.handle(message(PULL, range(n)), 1) == 0
        assert node.sink.sent[-1][1][-values.nbytes:] == values.tobytes()


def test_rings_have_a_power_of_two_of_places(probe):
    node = probe.Probe(4, 0, 2, max_workers=9)
    assert [node.add_worker(i, credit) for i, credit in enumerate((1, 1, 2, 3, 4, 5, 8, 9))] == [8, 1, 2, 4, 4, 8, 8, 16]
    assert node.add_worker(8, 1) == 1
    assert node.add_worker(9, 1) is None
    assert node.add_worker(2**32 - 1, 1) is None


def test_workers_do_not_overlap(probe):
    """Each has its own memory to the last byte, zeros at first, which is written here."""
    node = probe.Probe(4, 0, 2, dtype="float32", visible=2, max_workers=64)
    for i in range(64):
        assert node.add_worker(i, 8) == 8
        assert node.fill_tail(i) == 0
    for i in range(64):
        assert pull(node, [2], worker=i) == 0
        assert header(node.sink.sent[-1][1])[:4] == (PULL, 0, 0, i)


# --- what is forwarded, remembered, and not waited for

def test_hops(probe):
    """Each forward counts one; who has gone too long a way is served all the same where the key is."""
    node = probe.Probe(9, 0, 3, dtype="float32", visible=2)
    for hops in (0, 1, 62):
        assert node.handle(message(PULL, [4], hops=hops), 1) == 0
        assert header(node.sink.sent[-1][1])[:2] == (PULL, hops + 1)
    assert node.handle(message(PULL, [0], hops=64), 1) == 0
    assert header(node.sink.sent[-1][1])[:2] == (VALUES, 0)


@pytest.mark.parametrize(("rank", "key", "owner"), [(1, 7, 0), (1, 0, 2), (0, 3, 2), (0, 8, 1)])
def test_whoever_answered_is_asked_next(probe, rank, key, owner):
    """Also node 0, and for the first key that is homed at the next node."""
    node = probe.Probe(9, rank, 3, dtype="float32", visible=2, location_caches=True)
    assert node.handle(message(VALUES, [key], [0], bytes(8), origin=rank, ts=pull(node, [key])), owner) == 0
    pull(node, [key])
    assert [dest for dest, _ in node.sink.sent] == [key // 3, owner]


def test_this_node_is_no_guess(probe):
    node = probe.Probe(9, 1, 3, dtype="float32", visible=2, location_caches=True)
    assert node.handle(message(VALUES, [7], [0], bytes(8), origin=1, ts=pull(node, [7])), 1) == 0
    pull(node, [7])
    assert [dest for dest, _ in node.sink.sent] == [2, 2]


@pytest.mark.parametrize("caches", [False, True])
def test_owners_as_far_as_they_are_known(probe, caches):
    node = probe.Probe(9, 1, 3, dtype="float32", visible=2, location_caches=caches)
    assert node.handle(message(LOCALIZE, [4], origin=2), 2) == 0
    assert [node.owner(key) for key in range(9)] == [0, 0, 0, 1, 2, 1, 2, 2, 2]


def test_the_guesses_of_all_keys_have_a_place(probe):
    node = probe.Probe(1 << 14, 0, 2, dtype="float32", visible=2, location_caches=True)
    for key in range(1 << 13, 1 << 14, 256):
        ts = pull(node, [key + 255])
        assert node.handle(message(VALUES, [key + 255], [0], bytes(8), origin=0, ts=ts), 1) == 0
    assert node.look("audit")["directory"] == [[0, 0], [0, 0]]
    for key in range(1 << 13):
        assert node.owner(key) == 0


def test_without_shared_memory_an_operation_goes_through_the_own_channel(probe):
    node = probe.Probe(9, 0, 3, dtype="float32", visible=2, shared_memory=False)
    ts = pull(node, [0, 4])
    (dest, sent), = node.sink.sent
    assert dest == 0
    assert header(sent)[4] == 2
    assert node.handle(sent, 0) == 0
    assert node.sink.sent[-1][0] == 1
    assert not node.finished(ts)
    assert node.look("counters")["workers"][0]["pulled_remote"] == 0
    assert node.look("counters")["server"]["pulled_remote"] == 1


def test_a_localize_does_not_wait_for_operations_by_another_route(probe):
    """What has been sent by a guess is unanswered; the localize goes to the home, now."""
    node = probe.Probe(9, 0, 3, dtype="float32", visible=2, location_caches=True)
    assert node.handle(message(VALUES, [4], [0], bytes(8), origin=0, ts=pull(node, [4])), 2) == 0
    pull(node, [4])
    assert node.pinned() == (1, 1)
    node.issue(LOCALIZE, np.array([4]), EMPTY)
    assert [(dest, header(sent)[0]) for dest, sent in node.sink.sent[1:]] == [(2, PULL), (1, LOCALIZE)]


@pytest.mark.parametrize("caches", [False, True])
def test_a_queue_is_joined_without_a_channel(probe, caches):
    node = probe.Probe(9, 0, 3, dtype="float32", visible=2, location_caches=caches)
    node.issue(LOCALIZE, np.array([4]), EMPTY)
    locks = node.sink.locks
    ts = pull(node, [4])
    assert node.sink.locks == locks
    assert len(node.sink.sent) == 1
    assert node.handle(message(TRANSFER, [4], [1], bytes(8), origin=0), 1) == 0
    assert node.finished(ts)


def test_which_key_is_pinned(probe):
    node = probe.Probe(12, 0, 3, dtype="float32", visible=2, location_caches=True)
    assert not node.is_pinned(4)
    assert node.handle(message(VALUES, [4], [0], bytes(8), origin=0, ts=pull(node, [4])), 2) == 0
    pull(node, [4, 5])
    for key, pinned in ((4, True), (5, False), (6, False), (4, True), (7, False), (4, True)):
        assert node.is_pinned(key) == pinned


def test_what_is_counted(probe):
    """A home's HAND_OVER is no forwarded operation; a relocation takes from the localize to the TRANSFER."""
    node = probe.Probe(9, 0, 3, dtype="float32", visible=2)
    assert node.handle(message(LOCALIZE, [0], origin=2), 2) == 0
    assert node.handle(message(LOCALIZE, [0]), 1) == 0
    assert header(node.sink.sent[-1][1])[0] == HAND_OVER
    assert node.look("counters")["forwarded"] == 0
    node.sink.clock = 1000
    node.issue(LOCALIZE, np.array([4]), EMPTY)
    node.sink.clock = 1250
    assert node.handle(message(TRANSFER, [4], [1], bytes(8), origin=0), 1) == 0
    counters = node.look("counters")
    assert (counters["relocation_count"], counters["relocation_min_ns"], counters["relocation_max_ns"]) == (1, 250, 250)


def test_what_is_left_over(probe):
    node = probe.Probe(9, 0, 3, dtype="float32", visible=2, location_caches=True)
    assert node.look("leftovers") == {"coming": 0, "operations": 0, "pins": 0}
    node.issue(LOCALIZE, np.array([4, 5]), EMPTY)
    pull(node, [6])
    assert node.look("leftovers") == {"coming": 2, "operations": 2, "pins": 1}


# --- two threads in one call: the other one comes before a channel is locked, or between two steps

class Meanwhile:
    """Things that another thread does, at a step or before the lock of a channel."""

    def __init__(self, node, steps=None, locks=None):
        self.sink, self.steps, self.locks, self.step = node.sink, steps or {}, locks or {}, 0
        node.step_finely()
        self.listen()

    def listen(self):
        self.sink.at_step, self.sink.before_lock = self.stepped, self.locked

    def run(self, what):
        if what is not None:
            self.sink.at_step = self.sink.before_lock = None
            what()
            self.listen()

    def stepped(self):
        self.step += 1
        self.run(self.steps.pop(self.step, None))

    def locked(self, dest):
        self.run(self.locks.pop(dest, None))


def test_frames_begin_with_any_position(probe):
    """The second position comes first, since its key left while it was looked at; the first follows when its owner has changed; and each
    fills a frame."""
    half = (FRAME - HEADER - 2 * 12) // 8 + 1
    node = probe.Probe(12, 0, 3, dtype="float32", visible=half)
    assert node.handle(message(LOCALIZE, [0], origin=2), 2) == 0
    node.sink.sent.clear()
    done = []
    meanwhile = Meanwhile(node, {4: lambda: done.append(node.handle(message(LOCALIZE, [1]), 1))},
                          {2: lambda: done.append(node.handle(message(LOCALIZE, [0]), 1))})
    pull(node, [0, 1], 2 * half)
    assert done == [0, 0]
    assert meanwhile.step > 4
    assert [(dest, header(sent)[0], sent[HEADER]) for dest, sent in node.sink.sent] \
        == [(1, TRANSFER, 1), (2, HAND_OVER, 0), (1, PULL, 1), (1, PULL, 0)]


def test_one_key_twice_goes_one_way(probe):
    """The guess changes while a call with the same key twice is routed: both go by the route of the first."""
    node = probe.Probe(9, 0, 3, dtype="float32", visible=2, location_caches=True, max_workers=2)
    node.add_worker(1, 8)
    ts = pull(node, [4], worker=1)
    node.sink.sent.clear()
    done = []
    Meanwhile(node, {3: lambda: done.append(node.handle(message(VALUES, [4], [0], bytes(8), origin=0, worker=1, ts=ts), 2))})
    pull(node, [4, 4])
    assert done == [0]
    assert [(dest, header(sent)[4]) for dest, sent in node.sink.sent] == [(1, 1), (1, 1)]
    assert node.pinned() == (0, 1)


def test_rounds_are_not_looks(probe):
    """The key leaves while it is looked at; then, again and again, its owner changes before its channel is locked; in the end the key comes
    back, and leaves once more while it is looked at. Twice a look has said what cannot be."""
    node = probe.Probe(9, 0, 3, dtype="float32", visible=2, max_workers=2)
    node.add_worker(1, 8)
    done = []

    def localized(by):
        done.append(node.handle(message(LOCALIZE, [0], origin=by), by))

    class Moving(Meanwhile):
        def locked(self, dest):
            if len(done) < 1000:
                self.run(lambda: localized(3 - dest))

    def come():
        node.issue(LOCALIZE, np.array([0]), EMPTY, worker=1)
        done.append(node.handle(message(TRANSFER, [0], [1001], bytes(8), origin=0), 1))

    meanwhile = Moving(node, {2: lambda: localized(1), 3000: come, 3001: lambda: localized(2)})         # (three steps in a round)
    assert node.issued(PULL, np.array([0]), np.zeros(2, np.float32))[0] == 0
    assert done == [0] * 1002
    assert meanwhile.step == 3004
    assert (node.sink.sent[-1][0], header(node.sink.sent[-1][1])[0]) == (2, PULL)


# --- refusals

def test_a_position_that_is_not_there_is_named(probe):
    node = probe.Probe(9, 0, 3, dtype="float32", visible=2)
    ts = pull(node, [4])
    assert node.handle(message(VALUES, [4, 5], [0, 1], bytes(16), origin=0, ts=ts), 1) == BAD_ANSWER
    assert node.blamed() == (5, 0)


def test_an_answer_for_the_first_worker_that_cannot_be(probe):
    """Whatever lies behind the table of workers."""
    nodes = []
    for n in range(1, 40):
        nodes.append(probe.Probe(9, 0, 3, dtype="float32", visible=2, max_workers=n))
        assert nodes[-1].handle(message(ACK, [4], [0], origin=0, worker=n), 1) == BAD_ANSWER


def test_nothing_of_a_hand_over_is_noted_if_one_key_has_a_next_owner(probe):
    """Node 0 is the next owner here."""
    node = probe.Probe(9, 1, 3, dtype="float32", visible=2)
    node.issue(LOCALIZE, np.array([6, 7]), EMPTY)
    assert node.handle(message(HAND_OVER, [7], [2], origin=0), 2) == 0
    before = node.state()
    assert node.handle(message(HAND_OVER, [6, 7], [2, 3], origin=0), 2) == SECOND_NEXT
    assert node.blamed() == (7, 3)
    assert node.state() == before


@pytest.mark.parametrize("fine", [False, True])
def test_an_answer_that_no_pin_waits_for(probe, fine):
    """It names another key than was asked for, of the same length: a simulation is told, a job takes it."""
    node = probe.Probe(12, 0, 3, dtype="float32", visible=2, location_caches=True)
    node.issue(LOCALIZE, np.array([6, 7]), EMPTY)
    assert node.handle(message(TRANSFER, [6], [1], bytes(8), origin=0), 1) == 0
    if fine:
        node.step_finely()
    expected = BAD_ANSWER if fine else 0
    ts = pull(node, [4, 5, 8])
    assert node.handle(message(VALUES, [11], [0], bytes(8), origin=0, ts=ts), 1) == expected
    assert node.handle(message(PULL, [6], [1], hops=1, origin=0, ts=ts), 1) == expected           # (6 is here)
    assert node.handle(message(PULL, [7], [2], hops=1, origin=0, ts=ts), 1) == 0
    assert node.handle(message(TRANSFER, [7], [1], bytes(8), origin=0), 1) == expected
    assert node.finished(ts) == (not fine)
    assert node.sink.unsent == 0


def test_a_home_that_does_not_have_what_it_owns(probe):
    node = probe.Probe(9, 0, 3, dtype="float32", visible=2)
    node.lose(1)
    node.contradict(1, 0, 7)
    before = node.state()
    meanwhile = Meanwhile(node)
    assert node.issued(PULL, np.array([1]), np.zeros(2, np.float32))[0] == ERR_FAILED
    assert meanwhile.step == 2 * 1001               # it looks again a thousand times
    assert node.blamed() == (0, 0)                  # (that is for messages)
    assert node.handle(message(PULL, [1]), 1) == NOT_HERE
    assert node.blamed() == (1, 7)
    assert node.handle(message(LOCALIZE, [0, 1]), 1) == NOT_HERE
    assert node.blamed() == (1, 0)
    assert node.state()[0] == before[0]
    assert node.sink.sent == []


def test_a_home_with_another_epoch_than_the_key_has(probe):
    node = probe.Probe(9, 0, 3, dtype="float32", visible=2)
    for key in (0, 1):
        node.contradict(key, 0, 5)
    before = node.state()
    assert node.handle(message(LOCALIZE, [0, 1, 2]), 1) == BAD_EPOCH
    assert node.blamed() == (0, 6)
    assert node.state() == before
    assert node.latched() == 0
    assert node.sink.locked == 0


def test_a_home_that_forgets_a_next_owner(probe):
    node = probe.Probe(9, 1, 3, dtype="float32", visible=2)
    assert node.handle(message(LOCALIZE, [4], origin=2), 2) == 0
    node.issue(LOCALIZE, np.array([4]), EMPTY)
    assert node.handle(message(LOCALIZE, [4], origin=0), 0) == 0
    node.contradict(4, 1, 3)
    before = node.state()
    assert node.handle(message(LOCALIZE, [4], origin=2), 2) == SECOND_NEXT
    assert node.blamed() == (4, 4)
    assert node.state() == before
    assert node.latched() == 0


# --- channels that fail, and memory that ends

KEYS = 150                      # more than there is room for at first, or twice that


def coming(probe, n=KEYS, **settings):
    """Node 0 of 3; this many keys homed at node 1 are on their way here."""
    node = probe.Probe(3 * KEYS, 0, 3, dtype="float32", visible=2, **settings)
    node.issue(LOCALIZE, np.arange(KEYS, KEYS + n), EMPTY)
    return node


def arrived(probe, n=KEYS, **settings):
    node = coming(probe, n, **settings)
    for begin in range(KEYS, KEYS + n, 50):         # (more at once would make room for more)
        few = range(begin, min(begin + 50, KEYS + n))
        assert node.handle(message(TRANSFER, few, [1] * len(few), bytes(8 * len(few)), origin=0), 1) == 0
    return node


def queued(probe, moving, n=1):
    """Pulls of node 1 wait for the first of two keys; which go on to node 2."""
    node = coming(probe, 2)
    if moving:
        assert node.handle(message(HAND_OVER, [KEYS, KEYS + 1], [2, 2], origin=2), 1) == 0
    for ts in range(n):
        assert node.handle(message(PULL, [KEYS], ts=ts), 1) == 0
    return node


def moved(probe):
    """Node 0 of 3; its key 0 is at node 2."""
    node = probe.Probe(3 * KEYS, 0, 3, dtype="float32", visible=2)
    assert node.handle(message(LOCALIZE, [0], origin=2), 2) == 0
    return node


def own(probe):
    """The worker's push to a key homed at node 1 is under way."""
    node = probe.Probe(3 * KEYS, 0, 3, dtype="float32", visible=2)
    node.issue(PUSH, np.array([KEYS]), np.ones(2, np.float32))
    return node


def bare(probe, **settings):
    return probe.Probe(3 * KEYS, 0, 3, dtype="float32", visible=2, **settings)


def mixed(probe):
    lengths = np.arange(3 * KEYS, dtype=np.uint32) % 3 + 1
    return probe.Probe(3 * KEYS, 0, 3, dtype="float32", visible=lengths, stored=lengths)


FRAMES = {
    "served": (bare, message(PULL, [1, 2]), 1),
    "served in part": (bare, message(PULL, [1, KEYS]), 1),
    "forwarded": (bare, message(PUSH, [KEYS], values=bytes(8)), 1),
    "moved": (arrived, message(HAND_OVER, [KEYS], [2], origin=2), 1),
    "moved from home": (bare, message(LOCALIZE, [1, 2]), 1),
    "handed over": (moved, message(LOCALIZE, [0]), 1),
    "passed on": (lambda probe: queued(probe, True, 0), message(TRANSFER, [KEYS, KEYS + 1], [1, 1], bytes(16), origin=0), 1),
    "served and passed on": (lambda probe: queued(probe, True), message(TRANSFER, [KEYS, KEYS + 1], [1, 1], bytes(16), origin=0), 1),
    "answered late": (lambda probe: queued(probe, False), message(TRANSFER, [KEYS], [1], bytes(8), origin=0), 1),
}


@pytest.mark.parametrize("what", ["starved", "broken"])
@pytest.mark.parametrize("case", FRAMES)
def test_a_message_that_cannot_be_sent(probe, case, what):
    build, frame, src = FRAMES[case]
    node = build(probe)
    setattr(node.sink, what, True)
    assert node.handle(frame, src) == (SEND_FAILED if what == "broken" or case == "handed over" else NO_MEMORY)
    assert (node.sink.unsent, node.sink.locked, node.latched()) == (0, 0, 0)


@pytest.mark.parametrize("what", ["starved", "broken"])
@pytest.mark.parametrize("kind", [PULL, LOCALIZE])
def test_an_operation_that_cannot_be_sent(probe, kind, what):
    node = bare(probe)
    setattr(node.sink, what, True)
    assert node.issued(kind, np.array([KEYS, 2 * KEYS]), np.zeros(4, np.float32))[0] == (ERR_MEMORY if what == "starved" else ERR_FAILED)
    assert (node.sink.unsent, node.sink.locked, node.latched()) == (0, 0, 0)


@needs_statm
@pytest.mark.parametrize("caches", [False, True])
def test_a_directory_without_memory(probe, caches):
    """There is room for the slots; then not for the directory, or not for the guesses."""
    import resource
    if sanitized():
        pytest.skip("a sanitizer's mappings cannot be limited")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    keys, page = 1 << 26, resource.getpagesize()
    before = pages()
    resource.setrlimit(resource.RLIMIT_AS, (before * page + (1100 << 20 if caches else 700 << 20), limits[1]))
    try:
        with pytest.raises(MemoryError, match="67108864 keys"):
            probe.Probe(keys, 0, 1, dtype="float32", visible=1, location_caches=caches)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert pages() - before < (64 << 20) // page


@needs_statm
@pytest.mark.parametrize(("keys", "rank", "nodes"), [(1 << 20, 0, 2), (1 << 20, 1, 2), (1 << 20, 3, 4), (2, 2, 3)])
def test_a_protocol_gives_its_mappings_back(probe, keys, rank, nodes):
    """No more than its own, either: another one goes on. (The last has no keys, and a page for none.)"""
    other = probe.Probe(1 << 14, 1, 2, dtype="float32", visible=1, location_caches=True)
    before = 0
    for i in range(40 if keys > 2 else 1000):
        probe.Probe(keys, rank, nodes, dtype="float32", visible=1, location_caches=True)
        if i == 5:
            before = pages()
    assert sanitized() or abs(pages() - before) < 600
    assert other.handle(message(PUSH, [1 << 13, (1 << 14) - 1], values=bytes(8), origin=0), 0) == 0
    assert other.look("audit")["rows"] == [[0, 0], [0, 0]]


def test_what_waits_for_keys_that_never_come_is_given_back(probe):
    before = 0
    for i in range(200):
        node = coming(probe, 2)
        assert node.handle(message(PULL, [KEYS] * 100), 1) == 0
        if i == 100:
            before = allocated()
    assert allocated() - before < 100 * 1000        # 100 entries have more than 5,000 bytes


def test_the_audit_of_another_node_than_the_first(probe):
    """Its directory ends where its keys end."""
    node = probe.Probe(1 << 14, 1, 2, dtype="float32", visible=1)
    keys = list(range(1 << 13, 1 << 14, 64))
    for key in keys:
        assert node.handle(message(LOCALIZE, [key], origin=0), 0) == 0
    (count, digest), rest = node.look("audit")["directory"]
    assert count == len(keys)
    assert digest != 0
    assert rest == [0, 0]
