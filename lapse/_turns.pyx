# Design: see _turns.pxd.
from libc.math cimport log as ln
from libc.stdint cimport int64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memset
from lapse._draws cimport distribution_t, next_fraction, rng_t, weight_of
from lapse._here cimport here_t, is_here, recent_t, seen_add, seen_has, seen_init, seen_remove, seen_t
from lapse._store cimport store_t
from lapse._sync cimport load_i64
from lapse._types cimport ERR_MEMORY, Key


cdef void turns_init(turns_t* t) noexcept nogil:
    memset(t, 0, sizeof(turns_t))
    t.waiting.mask = -1


cdef void turns_free(turns_t* t) noexcept nogil:
    free(t.heap)
    free(t.waiting.keys)
    turns_init(t)


cdef void turns_clear(turns_t* t, int64_t kept) noexcept nogil:
    if t.room > kept or t.waiting.room > kept:
        turns_free(t)
    t.begun = False
    t.count = 0


# --- the heap --------------------------------------------------------------------------------------------------------------------

cdef int room_for(turns_t* t, int64_t n) noexcept nogil:
    """Room for n keys in all. 0, or ERR_MEMORY."""
    cdef turn_t* more
    if n > t.room:
        n = max(n, 2 * t.room + 16)
        more = <turn_t*>realloc(t.heap, n * sizeof(turn_t))
        if more == NULL:
            return ERR_MEMORY
        t.heap = more
        t.room = n
    return 0


cdef void sink(turns_t* t, int64_t i, turn_t turn) noexcept nogil:
    """Put a turn at place i, or further down: those that are sooner move up."""
    cdef int64_t child = 2 * i + 1
    while child < t.count:
        if child + 1 < t.count and t.heap[child + 1].when < t.heap[child].when:
            child += 1
        if turn.when <= t.heap[child].when:
            break
        t.heap[i] = t.heap[child]
        i = child
        child = 2 * i + 1
    t.heap[i] = turn


cdef void rise(turns_t* t, int64_t i, turn_t turn) noexcept nogil:
    """Put a turn at place i, or further up: those that are later move down."""
    while i > 0 and turn.when < t.heap[(i - 1) // 2].when:
        t.heap[i] = t.heap[(i - 1) // 2]
        i = (i - 1) // 2
    t.heap[i] = turn


cdef inline turn_t turn_of(const turns_t* t, Key key, double weight, rng_t* r) noexcept nogil:
    cdef turn_t turn
    turn.when = t.now - ln(1.0 - next_fraction(r)) / weight
    turn.key = key
    return turn


# --- the order -------------------------------------------------------------------------------------------------------------------

cdef int consider(turns_t* t, Key key, const store_t* s, const distribution_t* d, const seen_t* seen, rng_t* r) noexcept nogil:
    """Note a key if it takes part. 0, or ERR_MEMORY."""
    cdef double weight
    if s != NULL and not is_here(s, key):
        return 0
    weight = weight_of(d, key)
    if weight <= 0.0 or seen_has(seen, key):
        return 0
    if room_for(t, t.count + 1) != 0:
        return ERR_MEMORY
    t.heap[t.count] = turn_of(t, key, weight, r)
    t.count += 1
    return 0


cdef int begin(turns_t* t, const store_t* s, const distribution_t* d, const here_t* l, const recent_t* recent, const seen_t* seen,
               rng_t* r) noexcept nogil:
    cdef int64_t i
    cdef Key key
    t.begun = False
    t.count = 0
    t.now = 0.0
    if l == NULL:
        for key in range(d.low, d.high):
            if consider(t, key, s, d, seen, r) != 0:
                return ERR_MEMORY
    else:
        for i in range(l.count):
            if consider(t, l.keys[i], s, d, seen, r) != 0:
                return ERR_MEMORY
        for i in range(recent.count):
            if consider(t, recent.keys[i], s, d, seen, r) != 0:
                return ERR_MEMORY
    for i in range(t.count // 2 - 1, -1, -1):
        sink(t, i, t.heap[i])
    return 0


cdef int turns_of_all(turns_t* t, const distribution_t* d, const seen_t* seen, rng_t* r) noexcept nogil:
    if begin(t, NULL, d, NULL, NULL, seen, r) != 0:
        return ERR_MEMORY
    t.waiting.mask = -1                             # all are there
    t.begun = True
    return 0


cdef int turns_of_here(turns_t* t, const store_t* s, const distribution_t* d, const here_t* l, const recent_t* recent, const seen_t* seen,
                       int64_t arrivals, int64_t more, rng_t* r) noexcept nogil:
    cdef int64_t i
    if begin(t, s, d, l, recent, seen, r) != 0:
        return ERR_MEMORY
    t.most = t.count + more
    if seen_init(&t.waiting, t.most) != 0 or room_for(t, t.most) != 0:
        return ERR_MEMORY
    for i in range(t.count):
        seen_add(&t.waiting, t.heap[i].key)
    t.arrivals = arrivals
    t.begun = True
    return 0


cdef bint turns_join(turns_t* t, const distribution_t* d, const seen_t* seen, const int64_t* log, int64_t mask, const int64_t* arrivals,
                     rng_t* r) noexcept nogil:
    cdef int64_t now = load_i64(arrivals), i
    cdef double weight
    cdef Key key
    if now - t.arrivals > mask:                     # places of the log have been taken again
        return False
    for i in range(t.arrivals, now):
        key = load_i64(log + (i & mask))
        weight = weight_of(d, key)
        if weight <= 0.0 or seen_has(seen, key) or seen_has(&t.waiting, key):
            continue
        if t.count == t.most:
            return False
        seen_add(&t.waiting, key)
        t.count += 1
        rise(t, t.count - 1, turn_of(t, key, weight, r))
    if load_i64(arrivals) - t.arrivals > mask:      # while we read
        return False
    t.arrivals = now
    return True


cdef Key turns_next(turns_t* t) noexcept nogil:
    cdef turn_t first
    if t.count == 0:
        return -1
    first = t.heap[0]
    t.now = first.when
    t.count -= 1
    if t.count > 0:
        sink(t, 0, t.heap[t.count])
    seen_remove(&t.waiting, first.key)
    return first.key
