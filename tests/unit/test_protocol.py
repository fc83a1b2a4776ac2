"""One node, message by message. Every byte from another one is hostile: what is refused, before anything changes; and what is sent."""
import random
import struct
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.ext.probe_build import load_extension

pytest.importorskip("Cython")

EXT = Path(__file__).resolve().parents[1] / "ext"

PULL, PUSH, SET, LOCALIZE, HAND_OVER, TRANSFER, VALUES, ACK = range(1, 9)
BAD_SIZE, BAD_TYPE, BAD_KEY, BAD_ORIGIN, BAD_HOME, OWNER_ASKS, NOT_HERE, SECOND_NEXT, NOT_COMING, BAD_EPOCH, TOO_MANY_HOPS, BAD_ANSWER, \
    BAD_FIELD, TWICE = -100, -101, -102, -103, -104, -105, -106, -107, -108, -109, -110, -111, -114, -115


@pytest.fixture(scope="module")
def probe():
    return load_extension(EXT / "protocol_probe.pyx")


def message(kind, keys, aux=None, values=b"", *, hops=0, origin=1, worker=0, ts=0, count=None, value_bytes=None, reserved=0):
    keys = np.asarray(keys, np.int64)
    aux = np.asarray(range(len(keys)) if aux is None else aux, np.uint32)
    count = len(keys) if count is None else count
    value_bytes = len(values) if value_bytes is None else value_bytes
    head = struct.pack("<IHBBQQIIIIQQQ", 0, 1, kind, hops, 0, 1, 1, origin, worker, count, ts, value_bytes, reserved)
    return head + keys.tobytes() + aux.tobytes() + bytes(4 * (len(keys) & 1)) + values


# Keys 0-3 are homed at node 0 (this one), 4-7 at node 1; a value of key k has k + 1 numbers.
LENGTHS = np.arange(1, 9, dtype=np.uint32)


@pytest.fixture
def node(probe):
    return probe.Probe(8, 0, 2, dtype="float32", visible=LENGTHS, stored=LENGTHS)


def guarded(numbers):
    """An array with a border on both sides: (array, check)."""
    whole = np.full(numbers + 64, 7, np.float32)
    return whole[32:32 + numbers], lambda: bool((whole[:32] == 7).all() and (whole[32 + numbers:] == 7).all())


@pytest.mark.parametrize("hops", [1, 5])
def test_longer_value_than_asked_for(node, hops):
    """A pull that comes back to its own node, for another key than was asked for at that position."""
    out, intact = guarded(5)
    ts = node.issue(PULL, np.array([4]), out)
    assert node.handle(message(PULL, [3, 3], [0, 0], hops=hops, origin=0, ts=ts), 1) == BAD_ANSWER
    assert node.handle(message(PULL, [3], [0], hops=hops, origin=0, ts=ts), 1) == BAD_ANSWER
    assert node.handle(message(VALUES, [7], [0], bytes(32), origin=0, ts=ts), 1) == BAD_ANSWER
    assert intact()
    assert not node.finished(ts)
    assert node.handle(message(VALUES, [4], [0], np.arange(5, dtype=np.float32).tobytes(), origin=0, ts=ts), 1) == 0
    assert node.finished(ts)
    assert out.tolist() == [0, 1, 2, 3, 4]
    assert intact()


def test_longer_value_than_asked_for_from_the_queue(node):
    """The same, when it waits for a key in transfer."""
    out, intact = guarded(5)
    ts = node.issue(PULL, np.array([4]), out)
    node.issue(LOCALIZE, np.array([7]), np.empty(0))
    assert node.handle(message(PULL, [7], [0], hops=1, origin=0, ts=ts), 1) == BAD_ANSWER
    assert node.handle(message(TRANSFER, [7], [1], np.ones(8, np.float32).tobytes(), origin=0), 1) == 0
    assert intact()
    assert not node.finished(ts)


def test_more_answers_than_positions(node):
    for kind, keys in ((PULL, [4]), (PUSH, [4])):
        vals = np.zeros(5, np.float32)
        ts = node.issue(kind, np.array(keys), vals)
        values = bytes(20) if kind == PULL else b""
        assert node.handle(message(VALUES if kind == PULL else ACK, [4, 4], [0, 0], 2 * values, origin=0, ts=ts), 1) == BAD_ANSWER
        assert not node.finished(ts)


def test_a_position_is_answered_once(probe):
    """By which message does not matter; the others of the operation are not done by it."""
    node = probe.Probe(8, 0, 2, dtype="float32", visible=2)
    for kind, answer in ((PULL, VALUES), (PUSH, ACK)):
        ts = node.issue(kind, np.array([4, 5, 6]), np.zeros(6, np.float32))
        values = bytes(8) if kind == PULL else b""
        assert node.handle(message(answer, [4, 4], [0, 0], 2 * values, origin=0, ts=ts), 1) == BAD_ANSWER
        assert node.handle(message(answer, [4], [0], values, origin=0, ts=ts), 1) == 0
        before = node.state()
        assert node.handle(message(answer, [4], [0], values, origin=0, ts=ts), 1) == BAD_ANSWER
        assert node.handle(message(answer, [5, 4], [1, 0], 2 * values, origin=0, ts=ts), 1) == BAD_ANSWER
        assert node.handle(message(kind, [0], [0], bytes(8) if kind == PUSH else b"", hops=1, origin=0, ts=ts), 1) == BAD_ANSWER
        assert node.state() == before
        assert node.handle(message(kind, [0], [1], bytes(8) if kind == PUSH else b"", hops=1, origin=0, ts=ts), 1) == 0   # served here
        assert node.handle(message(answer, [5], [1], values, origin=0, ts=ts), 1) == BAD_ANSWER
        assert not node.finished(ts)
        assert node.handle(message(answer, [6], [2], values, origin=0, ts=ts), 1) == 0
        assert node.finished(ts)


def test_more_answers_than_positions_at_home(probe):
    node = probe.Probe(8, 0, 2, dtype="float32", visible=2)
    out, intact = guarded(2)
    ts = node.issue(PULL, np.array([4]), out)
    assert node.handle(message(PULL, [3, 2], [0, 0], hops=1, origin=0, ts=ts), 1) == BAD_ANSWER
    assert not node.finished(ts)
    assert intact()


def test_more_answers_than_positions_from_the_queue(probe):
    node = probe.Probe(8, 0, 2, dtype="float32", visible=2)
    ts = node.issue(PUSH, np.array([4]), np.zeros(2, np.float32))
    node.issue(LOCALIZE, np.array([7]), np.empty(0))
    assert node.handle(message(PUSH, [7, 7], [0, 0], bytes(16), hops=1, origin=0, ts=ts), 1) == BAD_ANSWER
    assert node.handle(message(PUSH, [7], [0], bytes(8), hops=1, origin=0, ts=ts), 1) == 0
    again = message(PUSH, [7], [0], bytes(8), hops=1, origin=0, ts=ts)
    assert node.handle(again, 1) == BAD_ANSWER                          # all that is left of it waits for the key
    assert node.handle(message(ACK, [4], [0], origin=0, ts=ts), 1) == BAD_ANSWER
    assert not node.finished(ts)
    assert node.handle(message(TRANSFER, [7], [1], bytes(8), origin=0), 1) == 0
    assert node.finished(ts)


def test_answer_to_an_operation_whose_place_is_taken(probe):
    """8 operations share a place: an old answer, once more, is none to the new one."""
    node = probe.Probe(8, 0, 2, dtype="float32", visible=2)
    answer = [message(VALUES, [4], [0], bytes(8), origin=0, ts=ts) for ts in range(9)]
    for ts in range(8):
        assert node.issue(PULL, np.array([4]), np.ones(2, np.float32)) == ts
        assert node.handle(answer[ts], 1) == 0
    out = np.ones(2, np.float32)
    assert node.issue(PULL, np.array([4]), out) == 8
    assert node.handle(answer[0], 1) == BAD_ANSWER
    assert out.tolist() == [1, 1]
    assert node.handle(answer[8], 1) == 0
    assert out.tolist() == [0, 0]


@pytest.mark.parametrize("kind", [PULL, LOCALIZE, HAND_OVER])
def test_answer_larger_than_a_frame(probe, kind):
    """One mebibyte per key: 15 keys fit into a frame, 16 do not, and 10,000 would be 10 GB here."""
    node = probe.Probe(40000, 0, 2, dtype="float32", visible=1 << 18)
    for n in (16, 10000):
        assert node.handle(message(kind, range(n)), 1) == BAD_SIZE
    assert node.sink.sent == []
    if kind != HAND_OVER:
        assert node.handle(message(kind, range(15)), 1) == 0
        (dest, answer), = node.sink.sent
        assert dest == 1
        assert 15 << 20 < len(answer) <= 1 << 24


@pytest.mark.parametrize("before", ["untouched", "coming"])
def test_the_same_key_twice_in_one_localize(probe, before):
    node = probe.Probe(9, 0, 3, dtype="float32", visible=2)
    if before == "coming":
        assert node.handle(message(LOCALIZE, [1], origin=2), 2) == 0
        node.issue(LOCALIZE, np.array([1]), np.empty(0))
    assert node.handle(message(LOCALIZE, [1, 1]), 1) < 0
    assert not any(dest == 1 and sent[6] == HAND_OVER for dest, sent in node.sink.sent)


@pytest.mark.parametrize("count", [0, 1, 3, 2**31, 2**32 - 1])
@pytest.mark.parametrize("value_bytes", [0, 8, 2**63, 2**64 - 1])
@pytest.mark.parametrize("kind", range(1, 9))
def test_counts_and_sizes_that_lie(node, kind, count, value_bytes):
    for frame in (message(kind, [4, 5], count=count, value_bytes=value_bytes), message(kind, [], count=count, value_bytes=value_bytes)):
        if count != len(frame[64:]) // 12 or value_bytes:
            assert node.handle(frame, 1) < 0
    assert node.sink.sent == []


def test_keys_that_do_not_exist(node):
    for key in (8, -1, 2**62, -2**63, 2**63 - 1):
        for kind in range(1, 9):
            assert node.handle(message(kind, [key]), 1) == BAD_KEY


# Each is right but for its last key, or for one field: (message, sender, what it is refused for).
FLOATS = {n: bytes(4 * n) for n in range(1, 20)}
REFUSED = {
    "nothing": (message(PULL, []), 1, BAD_SIZE),
    "reserved": (message(PUSH, [0], values=FLOATS[1], reserved=1), 1, BAD_FIELD),
    "localize forwarded": (message(LOCALIZE, [0, 1], hops=1), 1, BAD_FIELD),
    "hand-over forwarded": (message(HAND_OVER, [6], [2], hops=1), 1, BAD_FIELD),
    "transfer forwarded": (message(TRANSFER, [4], [1], FLOATS[5], hops=1, origin=0), 1, BAD_FIELD),
    "answer forwarded": (message(VALUES, [4], [0], FLOATS[5], hops=1, origin=0), 1, BAD_FIELD),
    "origin beyond the nodes": (message(PULL, [0, 1], origin=3), 1, BAD_ORIGIN),
    "origin beyond the nodes, forwarded": (message(PULL, [0, 1], origin=3, hops=1), 1, BAD_ORIGIN),
    "less than a header": (message(PULL, [0])[:63], 1, BAD_SIZE),
    "a header alone": (message(PULL, [0])[:64], 1, BAD_SIZE),
    "of no type": (message(0, [0]), 1, BAD_TYPE),
    "of a type that is not for the protocol": (message(ACK + 1, [0]), 1, BAD_TYPE),
    "a pull with values": (message(PULL, [0], values=FLOATS[1]), 1, BAD_SIZE),
    "a push without values": (message(PUSH, [0]), 1, BAD_SIZE),
    "a set without values": (message(SET, [0]), 1, BAD_SIZE),
    "a transfer without values": (message(TRANSFER, [6], [1], origin=0), 1, BAD_SIZE),
    "a pull that is answered without values": (message(VALUES, [3], [0], origin=0), 1, BAD_SIZE),
    "an answer with values": (message(ACK, [3], [0], FLOATS[4], origin=0), 1, BAD_SIZE),
    "a worker beyond the workers": (message(ACK, [3], [0], origin=0, worker=3), 1, BAD_ANSWER),
    "a worker far beyond the workers": (message(ACK, [3], [0], origin=0, worker=2**32 - 1), 1, BAD_ANSWER),
    "a worker that there is not yet": (message(ACK, [3], [0], origin=0, worker=1), 1, BAD_ANSWER),
    "an operation before the first": (message(ACK, [3], [0], origin=0, ts=2**64 - 1), 1, BAD_ANSWER),
    "an operation to come": (message(ACK, [3], [0], origin=0, ts=2), 1, BAD_ANSWER),
    "hand-over of what is coming and has a next owner, too": (message(HAND_OVER, [7], [3], origin=1), 2, SECOND_NEXT),
    "in the name of another": (message(PUSH, [0], values=FLOATS[1], origin=2), 1, BAD_ORIGIN),
    "localize of keys homed elsewhere": (message(LOCALIZE, [0, 1, 6]), 1, BAD_HOME),
    "localize by the owner": (message(LOCALIZE, [0, 2]), 2, BAD_ORIGIN),
    "localize by the owner, too": (message(LOCALIZE, [0, 2], origin=2), 2, OWNER_ASKS),
    "localize of a key twice": (message(LOCALIZE, [0, 1, 0]), 1, TWICE),
    "localize of a key twice, of many": (message(LOCALIZE, [*range(3), *range(3), *range(3), 0]), 1, TWICE),
    "hand-over by another than the home": (message(HAND_OVER, [4, 6], [2, 2], origin=2), 1, BAD_HOME),
    "hand-over to this node": (message(HAND_OVER, [4], [2], origin=0), 1, BAD_ORIGIN),
    "hand-over of a key that is not here": (message(HAND_OVER, [4, 5, 3], [2, 2, 1], origin=2), 1, NOT_HERE),
    "hand-over of a key twice": (message(HAND_OVER, [4, 5, 5], [2, 2, 2], origin=2), 1, TWICE),
    "hand-over with an old epoch": (message(HAND_OVER, [4, 5], [2, 1], origin=2), 1, BAD_EPOCH),
    "hand-over with an epoch to come": (message(HAND_OVER, [4, 5], [2, 3], origin=2), 1, BAD_EPOCH),
    "second next owner": (message(HAND_OVER, [7], [2], origin=2), 2, SECOND_NEXT),
    "transfer of a key that was not asked for": (message(TRANSFER, [6, 3], [1, 1], FLOATS[11], origin=0), 1, NOT_COMING),
    "transfer to another node": (message(TRANSFER, [6], [1], FLOATS[7], origin=2), 1, BAD_ORIGIN),
    "transfer of a key twice": (message(TRANSFER, [6, 6], [1, 1], FLOATS[14], origin=0), 1, TWICE),
    "transfer with an old epoch": (message(TRANSFER, [6], [0], FLOATS[7], origin=0), 1, BAD_EPOCH),
    "transfer with another epoch than its next owner's": (message(TRANSFER, [7], [4], FLOATS[8], origin=0), 1, BAD_EPOCH),
    "forwarded for ever": (message(PUSH, [0, 3], values=FLOATS[5], hops=64), 1, TOO_MANY_HOPS),
    "an operation that this node did not begin": (message(PUSH, [0, 6], values=FLOATS[8], hops=1, origin=0, ts=5), 1, BAD_ANSWER),
    "answer to another node's operation": (message(ACK, [3], [0], origin=1, ts=0), 1, BAD_ANSWER),
    "answer of another kind": (message(VALUES, [3], [0], FLOATS[4], origin=0, ts=0), 1, BAD_ANSWER),
    "answer to a position that is not there": (message(ACK, [3], [1], origin=0, ts=0), 1, BAD_ANSWER),
    "answers to more positions than there are": (message(ACK, [3, 3], [0, 0], origin=0, ts=0), 1, BAD_ANSWER),
}


@pytest.fixture
def busy(probe):
    """Node 0 of 3, with keys in every state: 0-2 are homed here, 3-5 at node 1, 6-8 at node 2; a value of key k has k + 1 numbers.

    0 and 1 are here, 2 is at node 2; 4 and 5 have come here; 6 and 7 are on their way, 7 goes on to node 1; a push to 3 is under way.
    """
    lengths = np.arange(1, 10, dtype=np.uint32)
    node = probe.Probe(9, 0, 3, dtype="float32", visible=lengths, stored=lengths, location_caches=True, max_workers=3)
    assert node.handle(message(PUSH, [0, 1], values=np.arange(3, dtype=np.float32).tobytes()), 1) == 0
    assert node.handle(message(LOCALIZE, [2], origin=2), 2) == 0
    assert node.issue(PUSH, np.array([3]), np.ones(4, np.float32)) == 0
    node.issue(LOCALIZE, np.array([4, 5, 6, 7]), np.empty(0))
    assert node.handle(message(TRANSFER, [4, 5], [1, 1], np.arange(11, dtype=np.float32).tobytes(), origin=0), 1) == 0
    assert node.handle(message(HAND_OVER, [7], [2], origin=1), 2) == 0
    assert node.handle(message(PUSH, [6], values=FLOATS[7]), 1) == 0
    return node


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_has_changed_nothing(busy, case):
    frame, src, why = REFUSED[case]
    before = busy.state()
    assert busy.handle(frame, src) == why
    assert busy.state() == before


def test_the_states_that_frames_are_refused_in(busy):
    """The same node takes the like of them, where they are right."""
    for frame, src in ((message(LOCALIZE, [0, 1]), 1), (message(HAND_OVER, [4, 5], [2, 2], origin=2), 1),
                       (message(TRANSFER, [6], [1], FLOATS[7], origin=0), 2), (message(TRANSFER, [7], [1], FLOATS[8], origin=0), 2),
                       (message(ACK, [3], [0], origin=0, ts=0), 1)):
        before = busy.state()
        assert busy.handle(frame, src) == 0
        assert busy.state() != before
    assert busy.finished(0)
    assert busy.sink.unsent == 0
    assert [(dest, sent[6]) for dest, sent in busy.sink.sent][-4:] == [(1, TRANSFER), (2, TRANSFER), (1, ACK), (1, TRANSFER)]


def test_the_key_and_its_epoch_are_named(busy):
    assert busy.handle(message(HAND_OVER, [4, 5], [2, 7], origin=2), 1) == BAD_EPOCH
    assert busy.blamed() == (5, 7)
    assert busy.handle(message(PULL, [0, 9]), 1) == BAD_KEY
    assert busy.blamed() == (9, 0)


# --- what a node sends

def header(sent):
    """(type, hops, origin, worker, count, timestamp, bytes of values, reserved)"""
    _, _, kind, hops, _, _, _, origin, worker, count, ts, value_bytes, reserved = struct.unpack("<IHBBQQIIIIQQQ", sent[:64])
    return kind, hops, origin, worker, count, ts, value_bytes, reserved


def test_every_byte_of_a_frame_is_written(probe):
    """The memory of a frame has held other things before; a recorded one is full of 0xaa, as no number here is."""
    node = probe.Probe(8, 0, 2, dtype="float32", visible=2)
    node.issue(PUSH, np.array([4, 5, 6]), np.zeros(6, np.float32))
    node.issue(PULL, np.array([4]), np.zeros(2, np.float32))
    node.issue(LOCALIZE, np.array([7]), np.empty(0))
    assert node.handle(message(PULL, [0, 1, 2], ts=3), 1) == 0
    assert node.handle(message(PUSH, [0], values=bytes(8), ts=4), 1) == 0
    assert node.handle(message(LOCALIZE, [3], ts=5), 1) == 0
    assert [header(sent)[0] for _, sent in node.sink.sent] == [PUSH, PULL, LOCALIZE, VALUES, ACK, TRANSFER]
    for dest, sent in node.sink.sent:
        assert dest == 1
        count = header(sent)[4]
        assert b"\xaa" not in sent
        assert header(sent)[7] == 0
        if count & 1:
            assert sent[64 + 12 * count:64 + 12 * count + 4] == bytes(4)
    assert header(node.sink.sent[0][1]) == (PUSH, 0, 0, 0, 3, 0, 24, 0)
    assert header(node.sink.sent[3][1]) == (VALUES, 0, 1, 0, 3, 3, 24, 0)
    assert header(node.sink.sent[5][1]) == (TRANSFER, 0, 1, 0, 1, 0, 8, 0)


HEADER, FRAME = 64, 1 << 24


@pytest.mark.parametrize("more", [0, 1])
def test_a_frame_is_filled_to_the_last_byte(probe, more):
    """Two values that fit into one frame exactly; with one number more, into two."""
    half = (FRAME - HEADER - 2 * 12) // 8
    lengths = np.array([half, half + more, half, half + more], np.uint32)
    node = probe.Probe(4, 0, 2, dtype="float32", visible=lengths, stored=lengths)
    node.issue(PUSH, np.array([2, 3]), np.zeros(2 * half + more, np.float32))
    assert [header(sent)[4] for _, sent in node.sink.sent] == ([1, 1] if more else [2])
    assert more or len(node.sink.sent[0][1]) == FRAME
    node.sink.sent.clear()
    ts = node.issue(PULL, np.array([2, 3]), np.zeros(2 * half + more, np.float32))
    assert [header(sent)[4] for _, sent in node.sink.sent] == ([1, 1] if more else [2])
    node.sink.sent.clear()
    assert ts == 1
    for kind, answer in ((PULL, VALUES), (LOCALIZE, TRANSFER)):
        frame = message(kind, [0, 1])
        if more:
            assert node.handle(frame, 1) == BAD_SIZE
            assert node.sink.sent == []
        else:
            assert node.handle(frame, 1) == 0
            assert [(header(sent)[0], len(sent)) for _, sent in node.sink.sent] == [(answer, FRAME)]
        node.sink.sent.clear()
    if not more:
        return
    node = probe.Probe(4, 0, 2, dtype="float32", visible=lengths, stored=lengths)
    assert node.handle(message(PULL, [1]), 1) == 0              # alone it fits


@pytest.mark.parametrize("more", [0, 1])
def test_answers_out_of_a_queue_fill_a_frame(probe, more):
    half = (FRAME - HEADER - 2 * 12) // 8
    lengths = np.array([1, 1, half, half + more], np.uint32)
    node = probe.Probe(4, 0, 2, dtype="float32", visible=lengths, stored=lengths)
    node.issue(LOCALIZE, np.array([2, 3]), np.empty(0))
    if more:                                                    # (it may not ask for both at once)
        assert node.handle(message(PULL, [2], [0], ts=9), 1) == 0
        assert node.handle(message(PULL, [3], [1], ts=9), 1) == 0
    else:
        assert node.handle(message(PULL, [2, 3], ts=9), 1) == 0
    node.sink.sent.clear()
    assert node.handle(message(TRANSFER, [2, 3], [1, 1], bytes(4 * (2 * half + more)), origin=0), 1) == 0
    assert [header(sent)[0] for _, sent in node.sink.sent] == ([VALUES, VALUES] if more else [VALUES])
    assert more or len(node.sink.sent[0][1]) == FRAME


def test_answers_to_one_operation_are_one_message(probe):
    node = probe.Probe(4, 0, 2, dtype="float32", visible=2)
    node.issue(LOCALIZE, np.array([2, 3]), np.empty(0))
    for ts in (7, 8, 7):
        assert node.handle(message(PULL, [2], [ts & 1], ts=ts), 1) == 0
    node.sink.sent.clear()
    assert node.handle(message(TRANSFER, [2], [1], bytes(8), origin=0), 1) == 0
    assert [header(sent)[4:6] for _, sent in node.sink.sent] == [(2, 7), (1, 8)]


# --- location caches, pins, arrivals

def test_a_route_is_remembered_and_kept(probe):
    """Keys 3-5 are homed at node 1. The next operation goes to whom the last answer came from; but not before all is answered."""
    node = probe.Probe(9, 0, 3, dtype="float32", visible=2, location_caches=True)

    def pull():
        ts = node.issue(PULL, np.array([4]), np.zeros(2, np.float32))
        return ts, node.sink.sent[-1][0]

    def answer(ts, src):
        assert node.handle(message(VALUES, [4], [0], bytes(8), origin=0, ts=ts), src) == 0

    ts, dest = pull()
    assert dest == 1
    assert node.pinned() == (0, 1)
    again, dest = pull()
    answer(ts, 2)                                               # known, but one is still under way to the home
    third, dest = pull()
    assert dest == 1
    answer(again, 2)
    answer(third, 2)
    assert node.pinned() == (0, 0)
    ts, dest = pull()
    assert dest == 2
    assert node.pinned() == (1, 1)
    answer(ts, 1)
    assert pull()[1] == 1
    assert node.pinned() == (0, 1)


def test_where_a_key_goes_is_remembered(probe):
    """A key that this node hands over, at once or as soon as it comes, is asked for where it went."""
    for early in (False, True):
        node = probe.Probe(9, 0, 3, dtype="float32", visible=2, location_caches=True)
        node.issue(LOCALIZE, np.array([4]), np.empty(0))
        frames = [(message(TRANSFER, [4], [1], bytes(8), origin=0), 1), (message(HAND_OVER, [4], [2], origin=2), 1)]
        for frame, src in reversed(frames) if early else frames:
            assert node.handle(frame, src) == 0
        assert [(dest, header(sent)[0]) for dest, sent in node.sink.sent] == [(1, LOCALIZE), (2, TRANSFER)]
        assert header(node.sink.sent[-1][1]) == (TRANSFER, 0, 2, 0, 1, 0, 8, 0)
        node.issue(PULL, np.array([4]), np.zeros(2, np.float32))
        assert node.sink.sent[-1][0] == 2


def test_keys_without_a_guess_go_to_their_home(probe):
    node = probe.Probe(9, 0, 3, dtype="float32", visible=2, location_caches=True)
    node.issue(PULL, np.array([4, 8, 3]), np.zeros(6, np.float32))
    assert [(dest, header(sent)[4]) for dest, sent in node.sink.sent] == [(1, 2), (2, 1)]


def test_pins_are_counted(probe):
    """Beside a table written down in Python: keys that share a place, routes of both kinds, and growth."""
    draw = random.Random(7)
    pins, model = probe.Pins(), {}
    assert pins.find(1) is None
    assert pins.drop(1) == -1
    for _ in range(20000):
        key = draw.randrange(200) * draw.choice([1, 1 << 44])
        if draw.random() < 0.55:
            route, cached = draw.randrange(9), draw.random() < 0.5
            assert pins.add(key, route, cached) == 0
            model.setdefault(key, [route, cached, 0])[2] += 1
        elif key in model:
            assert pins.drop(key) == 0
            model[key][2] -= 1
            if not model[key][2]:
                del model[key]
        else:
            assert pins.drop(key) == -1
        assert pins.find(key) == (tuple(model[key]) if key in model else None)
        assert pins.held() == (sum(pin[1] for pin in model.values()), len(model))
    for key in model:
        assert pins.find(key) == tuple(model[key])


@pytest.mark.parametrize("shift", [0, 44])
def test_two_threads_have_pins(probe, shift):
    """A worker adds while the server drops. With a shift all keys have the same place, so that each is looked for among the others."""
    with ThreadPoolExecutor(3) as threads:
        for _ in range(20):
            pins = probe.Pins()
            assert sum(threads.map(lambda i: pins.storm(8 * i, 8 * i + 8, 1000, shift), range(3))) == 0     # noqa: B023
            assert pins.held() == (0, 0)


def test_one_thread_at_a_time_is_at_the_pins(probe):
    pins = probe.Pins()
    assert pins.add(1, 2, True) == 0
    with ThreadPoolExecutor(1) as threads:
        for call, arguments, result in ((pins.find, (1,), (2, True, 1)), (pins.add, (1, 2, True), 0), (pins.drop, (1,), 0)):
            pins.lock(True)
            waiting = threads.submit(call, *arguments)
            time.sleep(0.2)
            done = waiting.done()
            pins.lock(False)
            assert waiting.result() == result
            assert not done


def test_arrivals_are_noted(probe):
    node = probe.Probe(12, 0, 2, dtype="float32", visible=2)
    node.watch(7, 10, 2)
    node.issue(LOCALIZE, np.arange(6, 12), np.empty(0))
    assert node.arrived() == (0, [])
    assert node.handle(message(TRANSFER, [6, 7, 10], [1, 1, 1], bytes(24), origin=0), 1) == 0
    assert node.arrived() == (1, [7])
    assert node.handle(message(TRANSFER, [9, 8], [1, 1], bytes(16), origin=0), 1) == 0
    assert node.arrived() == (3, [9, 8])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's record of its mappings")
def test_a_protocol_gives_its_memory_back(probe):
    """Directory, caches and slots are mapped, and no counter of malloc sees them."""
    def size():
        return int(Path("/proc/self/statm").read_text().split()[0])

    node, before = None, 0
    for i in range(12):
        node = probe.Probe(1 << 20, 0, 2, dtype="float32", visible=1, location_caches=True)
        before = before if i else size()
    assert node is not None
    assert size() - before < 3 * 512        # pages; a directory has 1024, a cache 512


@pytest.mark.parametrize("fine", [False, True])
@pytest.mark.parametrize("key", [1, 4])
def test_a_transfer_of_long_ago(probe, key, fine):
    """A key that comes a second time, at its home and elsewhere, comes with a later epoch; the home knows which. In a simulation, too."""
    node = probe.Probe(9, 0, 3, dtype="float32", visible=2)
    if fine:
        node.step_finely()
    home = key // 3
    if home == 0:
        assert node.handle(message(LOCALIZE, [key], origin=2), 2) == 0          # epoch 1
        node.issue(LOCALIZE, np.array([key]), np.empty(0))                      # 2
    else:
        node.issue(LOCALIZE, np.array([key]), np.empty(0))
        assert node.handle(message(TRANSFER, [key], [1], bytes(8), origin=0), 1) == 0
        assert node.handle(message(HAND_OVER, [key], [2], origin=2), 1) == 0
        node.issue(LOCALIZE, np.array([key]), np.empty(0))
    before = node.state()
    for epoch in (0, 1) if home == 0 else (0, 1, 2):
        assert node.handle(message(TRANSFER, [key], [epoch], bytes(8), origin=0), 2) == BAD_EPOCH
        assert node.blamed() == (key, epoch)
    if home == 0:
        assert node.handle(message(TRANSFER, [key], [3], bytes(8), origin=0), 2) == BAD_EPOCH
    assert node.state() == before
    assert node.handle(message(TRANSFER, [key], [2 if home == 0 else 3], bytes(8), origin=0), 2) == 0


def test_anything(probe):
    """Frames with wrong bytes in every place, at nodes with operations and transfers under way: no byte beside the arrays changes."""
    draw = random.Random(5)
    for _ in range(3000):
        node = probe.Probe(8, 0, 2, dtype="float32", visible=LENGTHS, stored=LENGTHS, max_workers=draw.choice([1, 3]),
                           location_caches=draw.random() < 0.5)
        out, intact = guarded(11)
        node.issue(PULL, np.array([4, 5]), out)
        node.issue(PUSH, np.array([4]), np.ones(5, np.float32))
        node.issue(LOCALIZE, np.array([6, 7]), np.empty(0))
        for _ in range(8):
            kind = draw.randint(1, 8)
            keys = [draw.choice([draw.randint(0, 7), draw.randint(4, 7)]) for _ in range(draw.randint(0, 4))]
            with_values = kind in (PUSH, SET, TRANSFER, VALUES)
            values = bytes(4 * sum(key + 1 for key in keys)) if with_values else b""
            frame = bytearray(message(kind, keys, [draw.choice([0, 1, 2, 5]) for _ in keys], values, hops=draw.choice([0, 1, 64]),
                                      origin=draw.choice([0, 1, 1, 2]), worker=draw.choice([0, 0, 1, 9]), ts=draw.choice([0, 1, 2, 8])))
            if draw.random() < 0.3:
                frame[draw.randrange(len(frame))] = draw.randrange(256)
            before = node.state()
            if node.handle(bytes(frame), 1) != 0:
                assert node.state() == before
                break
        assert intact()
