# Design: random bytes do not get past the first checks: sizes follow from counts, values from keys, epochs and timestamps from the state.
# So a frame is taken apart, changed in a place or a few, as somebody would who knows the bed's state, and put together again, mostly with
# the sizes that belong to it.
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memcpy, memmove, memset

from lapse._types cimport Key
from lapse._wire cimport (ACK, HAND_OVER, HEADER_BYTES, LOCALIZE, MAGIC, PULL, PUSH, SET, TRANSFER, VALUES, VERSION, aux_bytes, frame_bytes,
                          header_t)
from tests.fuzz._bed cimport KEYS, MAX_BEDS, MAX_FRAMES, NODES, Bed, layout_t
from tests.fuzz._door cimport Door

import sys

cdef enum:
    MOST = 12                   # keys of a frame that is taken apart
    ROOM = 2048                 # bytes of a frame
    INPUT = 8192

cdef list places = []           # beds, and doors
cdef layout_t layouts[MAX_BEDS]


cdef layout_t* layout_of(int number) noexcept:
    return &layouts[number % len(places)]


cdef const char* feed_place(int number, const uint8_t* data, size_t size) noexcept:
    place = places[number % len(places)]
    return (<Bed>place).feed_all(data, size) if isinstance(place, Bed) else (<Door>place).feed_all(data, size)


cdef struct parts_t:            # a frame that has been taken apart
    header_t h
    int n
    Key keys[MOST]
    uint32_t aux[MOST]
    uint8_t values[ROOM]
    size_t value_bytes


cdef inline uint64_t draw(uint64_t* rng) noexcept nogil:
    cdef uint64_t x
    rng[0] += <uint64_t>0x9e3779b97f4a7c15
    x = rng[0]
    x = (x ^ (x >> 30)) * <uint64_t>0xbf58476d1ce4e5b9
    x = (x ^ (x >> 27)) * <uint64_t>0x94d049bb133111eb
    return x ^ (x >> 31)


cdef inline int below(uint64_t* rng, int n) noexcept nogil:
    return <int>(((draw(rng) >> 32) * <uint64_t>n) >> 32)


cdef uint64_t odd_number(uint64_t* rng) noexcept nogil:
    """Where numbers of different widths and signs have their ends."""
    cdef int bits = below(rng, 65)
    cdef uint64_t x = (<uint64_t>1 << bits) if bits < 64 else 0
    return x + <uint64_t>(below(rng, 3) - 1)


# --- one frame ------------------------------------------------------------------------------------------------------------------------

cdef bint take_apart(const uint8_t* frame, size_t size, parts_t* p) noexcept nogil:
    if size < HEADER_BYTES:
        return False
    memcpy(&p.h, frame, HEADER_BYTES)
    if p.h.count > MOST or size < frame_bytes(p.h.count, 0) or size - frame_bytes(p.h.count, 0) > ROOM:
        return False
    p.n = <int>p.h.count
    memcpy(p.keys, frame + HEADER_BYTES, p.n * sizeof(Key))
    memcpy(p.aux, frame + HEADER_BYTES + p.n * sizeof(Key), p.n * sizeof(uint32_t))
    p.value_bytes = size - frame_bytes(p.n, 0)
    memcpy(p.values, frame + frame_bytes(p.n, 0), p.value_bytes)
    return True


cdef size_t put_together(parts_t* p, uint8_t* frame, size_t room) noexcept nogil:
    """The frame's size; 0: there is no room."""
    cdef size_t size = frame_bytes(p.n, p.value_bytes)
    if size > room:
        return 0
    memcpy(frame, &p.h, HEADER_BYTES)
    memset(frame + HEADER_BYTES, 0, size - HEADER_BYTES)
    memcpy(frame + HEADER_BYTES, p.keys, p.n * sizeof(Key))
    memcpy(frame + HEADER_BYTES + p.n * sizeof(Key), p.aux, p.n * sizeof(uint32_t))
    memcpy(frame + frame_bytes(p.n, 0), p.values, p.value_bytes)
    return size


cdef void fit(parts_t* p, const layout_t* l, uint64_t* rng) noexcept nogil:
    """Give a frame the sizes that belong to its type and keys."""
    cdef size_t wanted = 0
    cdef int i
    cdef bint moves = p.h.type == TRANSFER
    p.h.count = <uint32_t>p.n
    if moves or p.h.type == PUSH or p.h.type == SET or p.h.type == VALUES:
        for i in range(p.n):
            if 0 <= p.keys[i] < KEYS:
                wanted += l.stored[p.keys[i]] if moves else l.visible[p.keys[i]]
    while p.value_bytes < wanted:
        p.values[p.value_bytes] = <uint8_t>draw(rng)
        p.value_bytes += 1
    p.value_bytes = wanted
    p.h.value_bytes = wanted


cdef void new_frame(parts_t* p, const layout_t* l, uint64_t* rng) noexcept nogil:
    memset(&p.h, 0, sizeof(header_t))
    p.h.magic = MAGIC
    p.h.version = VERSION
    p.h.job = 0x5eed
    p.h.type = <uint8_t>(1 + below(rng, 8))
    p.h.origin = <uint32_t>((l.me + 1 + below(rng, NODES - 1)) % NODES)
    p.n = 0
    p.value_bytes = 0
    while p.n == 0 or (p.n < MOST and below(rng, 3)):
        p.keys[p.n] = below(rng, KEYS)
        p.aux[p.n] = <uint32_t>p.n
        p.n += 1


cdef void make_plausible(parts_t* p, const layout_t* l, uint64_t* rng) noexcept nogil:
    """An answer to an operation that is under way, or a message about keys as they could be on the way."""
    cdef int i, j
    p.h.hops = 0
    if below(rng, 2) and l.opened > 0:
        j = below(rng, l.opened)
        p.h.worker = l.open_worker[j]
        p.h.ts = l.open_ts[j]
        p.h.origin = <uint32_t>l.me
        p.h.type = VALUES if l.open_kind[j] == PULL else ACK
        if below(rng, 3) == 0:
            p.h.type = l.open_kind[j]           # it comes back to its origin
            p.h.hops = <uint8_t>(1 + below(rng, 3))
        for i in range(p.n):
            p.aux[i] = <uint32_t>below(rng, <int>l.open_n[j])
        return
    p.h.type = TRANSFER if below(rng, 2) else HAND_OVER
    p.h.origin = <uint32_t>(l.me if p.h.type == TRANSFER else (l.me + 1 + below(rng, NODES - 1)) % NODES)
    for i in range(p.n):
        if 0 <= p.keys[i] < KEYS:
            p.aux[i] = l.epochs[p.keys[i]]


cdef void change(parts_t* p, const layout_t* l, uint64_t* rng) noexcept nogil:
    cdef int what = below(rng, 18), i = below(rng, p.n) if p.n else 0, j
    if what == 0:
        p.h.type = <uint8_t>(1 + below(rng, 8)) if below(rng, 8) else <uint8_t>draw(rng)
    elif what == 1:
        j = below(rng, 6)
        p.h.hops = <uint8_t>(j if j < 3 else 66 - j if j < 5 else draw(rng))        # 0, 1, 2, 63, 62, any
        if below(rng, 4) == 0:
            p.h.hops = <uint8_t>(63 + below(rng, 3))
    elif what == 2:
        p.h.origin = <uint32_t>below(rng, NODES) if below(rng, 4) else <uint32_t>odd_number(rng)
    elif what == 3:
        p.h.worker = <uint32_t>below(rng, 2) if below(rng, 4) else <uint32_t>odd_number(rng)
    elif what == 4:
        if l.opened > 0 and below(rng, 4):
            j = below(rng, l.opened)
            p.h.worker = l.open_worker[j]
            p.h.ts = l.open_ts[j] + <uint64_t>(8 * (below(rng, 3) - 1) if below(rng, 4) == 0 else 0)
        else:
            p.h.ts = odd_number(rng)
    elif what == 5 and p.n:
        p.keys[i] = below(rng, KEYS)
    elif what == 6 and p.n:
        p.keys[i] = <Key>odd_number(rng) if below(rng, 2) else KEYS + below(rng, 3) - 1
    elif what == 7 and p.n:
        p.aux[i] = <uint32_t>below(rng, 4) if below(rng, 4) else <uint32_t>odd_number(rng)
    elif what == 8 and p.n and 0 <= p.keys[i] < KEYS:
        p.aux[i] = l.epochs[p.keys[i]] + <uint32_t>(below(rng, 3) - 1)
    elif what == 9 and p.n < MOST:
        p.keys[p.n] = below(rng, KEYS)
        p.aux[p.n] = <uint32_t>(p.n if below(rng, 2) else below(rng, 4))
        p.n += 1
    elif what == 10 and p.n:
        p.n -= 1
        p.keys[i] = p.keys[p.n]
        p.aux[i] = p.aux[p.n]
    elif what == 11 and 0 < p.n < MOST:         # the same key twice
        p.keys[p.n] = p.keys[i]
        p.aux[p.n] = p.aux[i]
        p.n += 1
    elif what == 12 and p.value_bytes:
        p.values[below(rng, <int>p.value_bytes)] = <uint8_t>draw(rng)
    elif what == 13:
        p.h.reserved = odd_number(rng)
    elif what == 14:
        new_frame(p, l, rng)
    elif what == 15:                            # what is looked at at the door
        j = below(rng, 6)
        if j == 0:
            p.h.magic ^= <uint32_t>odd_number(rng)
        elif j == 1:
            p.h.version = <uint16_t>odd_number(rng)
        elif j == 2:
            p.h.job ^= odd_number(rng)
        elif j == 3:
            p.h.src = <uint32_t>odd_number(rng)
        elif j == 4:
            p.h.type = <uint8_t>(16 + below(rng, 5))
            p.n = 0
            p.h.seq = 1
        p.h.seq = <uint64_t>below(rng, 4) if j < 5 else odd_number(rng)
    else:
        make_plausible(p, l, rng)


cdef size_t mutate_frame(uint8_t* frame, size_t size, const layout_t* l, uint64_t* rng, inner_t inner) noexcept:
    """In place; at most ROOM bytes; the new size."""
    cdef parts_t p
    cdef size_t made
    cdef int i
    memset(&p, 0, sizeof(p))
    if below(rng, 8) == 0 and size:
        if inner != NULL:
            return inner(frame, size, ROOM)
        frame[below(rng, <int>size)] = <uint8_t>draw(rng)
        return size if below(rng, 4) else <size_t>below(rng, <int>size)
    if not take_apart(frame, size, &p):
        new_frame(&p, l, rng)
    for i in range(1 + below(rng, 3)):
        change(&p, l, rng)
    if below(rng, 8):
        fit(&p, l, rng)
    elif below(rng, 2):
        p.h.count = <uint32_t>odd_number(rng) if below(rng, 2) else <uint32_t>(p.n + below(rng, 3) - 1)
    else:
        p.h.value_bytes = odd_number(rng) if below(rng, 2) else p.value_bytes + <uint64_t>(4 * (below(rng, 3) - 1))
    made = put_together(&p, frame, ROOM)
    return made if made else size


# --- an input -----------------------------------------------------------------------------------------------------------------------

cdef size_t mutate_input(uint8_t* data, size_t size, size_t max_size, uint64_t seed, inner_t inner) noexcept:
    cdef uint64_t rng = seed
    cdef size_t starts[MAX_FRAMES + 1]
    cdef size_t sizes[MAX_FRAMES]
    cdef uint8_t frame[ROOM]
    cdef size_t at = 1, n, made, grows
    cdef int frames = 0, i
    cdef layout_t* l
    if len(places) == 0 or max_size < 1 + 3 + ROOM:
        return size
    if size == 0 or below(&rng, 32) == 0:
        data[0] = <uint8_t>draw(&rng)
        size = max(size, <size_t>1)
    l = layout_of(data[0])
    while at + 3 <= size and frames < MAX_FRAMES:
        n = min(<size_t>data[at + 1] | <size_t>data[at + 2] << 8, size - at - 3)
        starts[frames] = at
        sizes[frames] = n
        frames += 1
        at += 3 + n
    i = below(&rng, frames + 1)
    if i == frames or (below(&rng, 12) == 0 and frames < MAX_FRAMES):   # one more, new or the same once more
        if frames == MAX_FRAMES or at + 3 + ROOM > max_size:
            return size
        n = 0
        if i < frames:
            n = min(sizes[i], <size_t>ROOM)
            memcpy(frame, data + starts[i] + 3, n)
        data[at] = <uint8_t>draw(&rng)
        starts[frames] = at
        sizes[frames] = 0
        size = at + 3
        i = frames
    elif below(&rng, 16) == 0:                                          # away with it
        memmove(data + starts[i], data + starts[i] + 3 + sizes[i], size - starts[i] - 3 - sizes[i])
        return size - 3 - sizes[i]
    else:
        if below(&rng, 8) == 0:
            data[starts[i]] = <uint8_t>draw(&rng)
        n = min(sizes[i], <size_t>ROOM)
        memcpy(frame, data + starts[i] + 3, n)
    made = mutate_frame(frame, n, l, &rng, inner)
    if size - sizes[i] + made > max_size:
        return size
    at = starts[i] + 3
    memmove(data + at + made, data + at + sizes[i], size - at - sizes[i])
    memcpy(data + at, frame, made)
    data[at - 2] = <uint8_t>made
    data[at - 1] = <uint8_t>(made >> 8)
    return size - sizes[i] + made


def put(place):
    """One more bed (frozen) or door; its number is the next one."""
    if len(places) == MAX_BEDS:
        raise ValueError(f"more than {MAX_BEDS} places")
    if isinstance(place, Bed):
        (<Bed>place).describe_to(&layouts[len(places)])
    else:
        layouts[len(places)] = layouts[0]
    places.append(place)


def all_places():
    return list(places)


def figures():
    """Frames that were accepted, and refused, since the beds were made."""
    return (sum([place.accepted if isinstance(place, Bed) else place.passed for place in places]),
            sum([place.refused if isinstance(place, Bed) else place.stopped for place in places]))


def mutate(bytes data, uint64_t seed, int times=1):
    """A changed input."""
    cdef uint8_t buffer[INPUT]
    cdef const char* p = data
    cdef size_t size = min(<size_t>len(data), <size_t>INPUT)
    cdef int i
    memcpy(buffer, p, size)
    for i in range(times):
        size = mutate_input(buffer, size, INPUT, seed + <uint64_t>i * 7919, NULL)
    return (<char*>buffer)[:size]


def campaign(list corpus, uint64_t seed, int64_t executions):
    """Feed so many inputs made out of those of the corpus. Returns None, or (input, what it broke)."""
    cdef uint8_t buffer[INPUT]
    cdef uint64_t rng = seed
    cdef int64_t i
    cdef int j
    cdef size_t size
    cdef bytes start
    cdef const char* p
    cdef const char* wrong
    for i in range(executions):
        start = corpus[below(&rng, <int>len(corpus))]
        p = start
        size = min(<size_t>len(start), <size_t>INPUT)
        memcpy(buffer, p, size)
        for j in range(1 + below(&rng, 4)):
            size = mutate_input(buffer, size, INPUT, draw(&rng), NULL)
        if size > 0:
            wrong = feed_place(buffer[0], buffer + 1, size - 1)
            if wrong != NULL:
                return (<char*>buffer)[:size], wrong.decode()
    return None


# --- for target.c -----------------------------------------------------------------------------------------------------------------

cdef int run_input(const uint8_t* data, size_t size) noexcept:
    """0, or 1 after it has said what the input broke."""
    if size == 0 or feed_place(data[0], data + 1, size - 1) == NULL:
        return 0
    print(places[data[0] % len(places)].report(), file=sys.stderr, flush=True)
    return 1


def doors():
    """The addresses of run_input and mutate_input."""
    return <uintptr_t>&run_input, <uintptr_t>&mutate_input
