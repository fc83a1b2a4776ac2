# Design: see _here.pxd.
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memset
from lapse._draws cimport (UNIFORM, build_columns, column_key, column_t, distribution_t, next_below, next_fraction, next_number, rng_t,
                           weight_of)
from lapse._store cimport store_t
from lapse._sync cimport load_i64, nanoseconds
from lapse._types cimport ERR_MEMORY, Key


cdef here_t* look_here(const store_t* s, const distribution_t* d, double total, const int64_t* arrivals) noexcept nogil:
    cdef here_t* l = <here_t*>malloc(sizeof(here_t))
    if l == NULL:
        return NULL
    memset(l, 0, sizeof(here_t))
    l.arrivals = load_i64(arrivals)
    l.looked = nanoseconds()
    if list_here(l, s, d, total) != 0:
        here_free(l)
        return NULL
    l.cost = nanoseconds() - l.looked
    return l


cdef int list_here(here_t* l, const store_t* s, const distribution_t* d, double total) noexcept nogil:
    cdef double* weights = NULL
    cdef int64_t room = 0, i
    cdef double weight, here = 0.0
    cdef Key key
    cdef Key* more
    for key in range(d.low, d.high):
        if not is_here(s, key):
            continue
        weight = weight_of(d, key)
        if weight <= 0.0:
            continue
        here += weight
        if l.count == room:
            room = 2 * room + 64
            more = <Key*>realloc(l.keys, room * sizeof(Key))
            if more == NULL:
                return ERR_MEMORY
            l.keys = more
        l.keys[l.count] = key
        l.count += 1
    l.share = here / total
    if l.share * FEW >= 1.0:
        free(l.keys)
        l.keys = NULL
    elif d.kind != UNIFORM and l.count > 0:
        weights = <double*>malloc(l.count * sizeof(double))
        if weights == NULL:
            return ERR_MEMORY
        for i in range(l.count):
            weights[i] = weight_of(d, l.keys[i])
        l.columns = build_columns(weights, l.count)
        free(weights)
        if l.columns == NULL:
            return ERR_MEMORY
    return 0


cdef void here_free(here_t* l) noexcept nogil:
    if l != NULL:
        free(l.keys)
        free(l.columns)
        free(l)


cdef Key pick_listed(const here_t* l, rng_t* r) noexcept nogil:
    if l.columns != NULL:
        return l.keys[column_key(l.columns, <uint64_t>l.count, next_number(r))]
    return l.keys[next_below(r, <uint64_t>l.count)]


cdef Key pick_exactly(const store_t* s, const distribution_t* d, const here_t* l, const seen_t* seen, rng_t* r) noexcept nogil:
    """Each key takes the place of the one chosen so far with its share of the weight up to there (Chao, 1982, for one item)."""
    cdef bint listed = l != NULL and l.keys != NULL
    cdef int64_t n = l.count if listed else <int64_t>d.span, i
    cdef double total = 0.0, weight
    cdef Key key, chosen = -1
    for i in range(n):
        key = l.keys[i] if listed else d.low + i
        if not is_here(s, key):
            continue
        weight = weight_of(d, key)
        if weight <= 0.0 or (seen.mask >= 0 and seen_has(seen, key)):
            continue
        total += weight
        if next_fraction(r) * total < weight:
            chosen = key
    return chosen


# --- keys that have been drawn ----------------------------------------------------------------------------------------------

cdef inline int64_t place_of(const seen_t* seen, Key key) noexcept nogil:
    """Where the key is, or would be put."""
    cdef int64_t i = <int64_t>((<uint64_t>key * <uint64_t>0x9e3779b97f4a7c15) >> 20) & seen.mask
    while seen.keys[i] >= 0 and seen.keys[i] != key:
        i = (i + 1) & seen.mask
    return i


cdef int seen_init(seen_t* seen, int64_t n) noexcept nogil:
    cdef int64_t size = 16
    while size < 2 * n:
        size *= 2
    if seen.room < size:
        free(seen.keys)
        seen.room = 0
        seen.mask = -1
        seen.keys = <Key*>malloc(size * sizeof(Key))
        if seen.keys == NULL:
            return ERR_MEMORY
        seen.room = size
    seen.mask = size - 1
    memset(seen.keys, 0xff, size * sizeof(Key))
    return 0


cdef bint seen_has(const seen_t* seen, Key key) noexcept nogil:
    return seen.mask >= 0 and seen.keys[place_of(seen, key)] == key


cdef bint seen_add(seen_t* seen, Key key) noexcept nogil:
    cdef int64_t i
    if seen.mask < 0:
        return True
    i = place_of(seen, key)
    if seen.keys[i] == key:
        return False
    seen.keys[i] = key
    return True
