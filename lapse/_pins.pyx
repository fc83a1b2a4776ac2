# Design: see _pins.pxd. Deletion shifts the following run back, so that there are no tombstones to skip or to clean up.
from libc.stdlib cimport free, malloc
from libc.stdint cimport uint64_t
from lapse._sync cimport add_i64, pause, store_i32, swap_i32, yield_core
from lapse._types cimport ERR_MEMORY


cdef inline int64_t _place(const pins_t* p, Key key) noexcept nogil:
    return <int64_t>((<uint64_t>key * <uint64_t>0x9E3779B97F4A7C15) >> 20) & p.mask


cdef inline void _lock(pins_t* p) noexcept nogil:
    cdef int spins = 0
    while swap_i32(&p.lock, 1):
        pause()
        spins += 1
        if spins > 64:
            yield_core()
            spins = 0


cdef inline int64_t _seek(const pins_t* p, Key key) noexcept nogil:
    """The place of the key, or the free one where it would go."""
    cdef int64_t at = _place(p, key)
    while p.places[at].key != key and p.places[at].key != -1:
        at = (at + 1) & p.mask
    return at


cdef int _grow(pins_t* p) noexcept nogil:
    cdef pins_t bigger
    cdef int64_t i
    bigger.mask = 2 * p.mask + 1 if p.places != NULL else 63
    bigger.places = <pin_t*>malloc((bigger.mask + 1) * sizeof(pin_t))
    if bigger.places == NULL:
        return ERR_MEMORY
    for i in range(bigger.mask + 1):
        bigger.places[i].key = -1
    if p.places != NULL:
        for i in range(p.mask + 1):
            if p.places[i].key != -1:
                bigger.places[_seek(&bigger, p.places[i].key)] = p.places[i]
    free(p.places)
    p.places = bigger.places
    p.mask = bigger.mask
    return 0


cdef void pins_free(pins_t* p) noexcept nogil:
    free(p.places)
    p.places = NULL


cdef bint pin_find(pins_t* p, Key key, pin_t* out) noexcept nogil:
    cdef bint found = False
    cdef int64_t at
    _lock(p)
    if p.places != NULL:
        at = _seek(p, key)
        found = p.places[at].key == key
        out[0] = p.places[at]
    store_i32(&p.lock, 0)
    return found


cdef int pin_add(pins_t* p, Key key, Rank route, bint cached) noexcept nogil:
    cdef int64_t at
    cdef int rc = 0
    _lock(p)
    if p.places == NULL or p.used * 2 > p.mask:
        rc = _grow(p)
    if rc == 0:
        at = _seek(p, key)
        if p.places[at].key == -1:
            p.places[at].key = key
            p.places[at].route = route
            p.places[at].cached = cached
            p.places[at].count = 0
            p.used += 1
            if cached:
                add_i64(&p.cached, 1)
        p.places[at].count += 1
    store_i32(&p.lock, 0)
    return rc


cdef int pin_drop(pins_t* p, Key key) noexcept nogil:
    cdef int64_t at, hole, wanted
    cdef int rc = -1
    _lock(p)
    if p.places != NULL:
        at = _seek(p, key)
        if p.places[at].key == key:
            rc = 0
            p.places[at].count -= 1
            if p.places[at].count == 0:
                p.used -= 1
                if p.places[at].cached:
                    add_i64(&p.cached, -1)
                hole = at
                while True:
                    at = (at + 1) & p.mask
                    if p.places[at].key == -1:
                        break
                    wanted = _place(p, p.places[at].key)
                    # move it into the hole unless its own place lies cyclically in (hole, at]
                    if (at - wanted) & p.mask >= (at - hole) & p.mask:
                        p.places[hole] = p.places[at]
                        hole = at
                p.places[hole].key = -1
    store_i32(&p.lock, 0)
    return rc
