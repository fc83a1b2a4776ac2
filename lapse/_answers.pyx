# Design: see _answers.pxd.
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy, memset

from lapse._types cimport ERR_MEMORY, Key, Rank, Timestamp
from lapse._wire cimport FRAME_BYTES, HEADER_BYTES, aux_bytes, frame_bytes, header_t


cdef void answers_free(answers_t* all_) noexcept nogil:
    cdef int i
    for i in range(all_.room):
        free(all_.list[i].keys)
        free(all_.list[i].positions)
        free(all_.list[i].values)
    free(all_.list)


cdef answer_t* answer_to(answers_t* all_, Rank origin, uint32_t worker, Timestamp ts, int kind, size_t size) noexcept nogil:
    cdef int i
    cdef answer_t* a
    cdef answer_t* more
    # It looks back a few only: several answers to one operation are legal.
    for i in range(all_.used - 1, max(all_.used - 17, -1), -1):
        a = all_.list + i
        if a.ts == ts and a.worker == worker and a.origin == origin and a.kind == kind:
            if frame_bytes(a.count + 1, a.value_bytes + size) <= FRAME_BYTES:
                return a
    if all_.used == all_.room:
        more = <answer_t*>realloc(all_.list, (2 * all_.room + 16) * sizeof(answer_t))
        if more == NULL:
            return NULL
        memset(more + all_.room, 0, (all_.room + 16) * sizeof(answer_t))
        all_.list = more
        all_.room = 2 * all_.room + 16
    a = all_.list + all_.used
    all_.used += 1
    a.origin = origin
    a.worker = worker
    a.ts = ts
    a.kind = kind
    a.count = 0
    a.value_bytes = 0
    return a


cdef int answer_add(answer_t* a, Key key, uint32_t position, const char* row, size_t size) noexcept nogil:
    if a.count == a.room and grow_answer(a) != 0:
        return ERR_MEMORY
    a.keys[a.count] = key
    a.positions[a.count] = position
    return append_value(a, row, size) if row != NULL else 0


cdef void answer_copy(const answer_t* a, char* p) noexcept nogil:
    memcpy(p, a.keys, a.count * sizeof(Key))
    p += a.count * sizeof(Key)
    memcpy(p, a.positions, a.count * sizeof(uint32_t))
    p += aux_bytes(a.count)
    if a.value_bytes:
        memcpy(p, a.values, a.value_bytes)


cdef void write_header(char* data, int kind, uint32_t origin, uint32_t worker, uint64_t ts, size_t count,
                       size_t value_bytes) noexcept nogil:
    cdef header_t* h = <header_t*>data
    memset(h, 0, HEADER_BYTES)
    h.type = <uint8_t>kind
    h.origin = origin
    h.worker = worker
    h.ts = ts
    h.count = <uint32_t>count
    h.value_bytes = value_bytes
    if count & 1:
        (<uint32_t*>(data + HEADER_BYTES + count * sizeof(Key)))[count] = 0      # the padding


cdef int grow_answer(answer_t* a) noexcept nogil:
    cdef int64_t room = 2 * a.room if a.room else 16
    cdef void* p = realloc(a.keys, room * sizeof(Key))
    if p == NULL:
        return ERR_MEMORY
    a.keys = <Key*>p
    p = realloc(a.positions, room * sizeof(uint32_t))
    if p == NULL:
        return ERR_MEMORY
    a.positions = <uint32_t*>p
    a.room = room
    return 0


cdef int append_value(answer_t* a, const char* row, size_t size) noexcept nogil:
    cdef size_t room
    cdef void* p
    if a.value_bytes + size > a.value_room:
        room = max(2 * a.value_room, a.value_bytes + size)
        p = realloc(a.values, room)
        if p == NULL:
            return ERR_MEMORY
        a.values = <char*>p
        a.value_room = room
    if size:
        memcpy(a.values + a.value_bytes, row, size)
        a.value_bytes += size
    return 0
