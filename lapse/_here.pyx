# Design: see _here.pxd.
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memset
from lapse._draws cimport (UNIFORM, build_columns, column_key, column_t, distribution_t, next_below, next_fraction, next_number, rng_t,
                           weight_of)
from lapse._store cimport store_t
from lapse._sync cimport load_i64
from lapse._types cimport ERR_MEMORY, Key


cdef here_t* look_here(const store_t* s, const distribution_t* d, double total, const int64_t* arrivals) noexcept nogil:
    cdef here_t* l = <here_t*>malloc(sizeof(here_t))
    if l == NULL:
        return NULL
    memset(l, 0, sizeof(here_t))
    l.arrivals = load_i64(arrivals)
    if list_here(l, s, d, total) != 0:
        here_free(l)
        return NULL
    return l


cdef int list_here(here_t* l, const store_t* s, const distribution_t* d, double total) noexcept nogil:
    cdef double* weights = NULL
    cdef int64_t room = 0, i
    cdef double weight
    cdef Key key
    cdef Key* more
    for key in range(d.low, d.high):
        if not is_here(s, key):
            continue
        weight = weight_of(d, key)
        if weight <= 0.0:
            continue
        l.weight += weight
        if l.count == room:
            room = 2 * room + 64
            more = <Key*>realloc(l.keys, room * sizeof(Key))
            if more == NULL:
                return ERR_MEMORY
            l.keys = more
        l.keys[l.count] = key
        l.count += 1
    l.many = l.weight * FEW >= total
    if l.many:
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


# --- what has come since ---------------------------------------------------------------------------------------------------------

cdef int recent_init(recent_t* r, int64_t room) noexcept nogil:
    memset(r, 0, sizeof(recent_t))
    r.known.mask = -1
    r.room = room
    r.keys = <Key*>malloc(room * sizeof(Key))
    r.sums = <double*>malloc(room * sizeof(double))
    if r.keys == NULL or r.sums == NULL:
        return ERR_MEMORY
    return seen_init(&r.known, room)


cdef void recent_free(recent_t* r) noexcept nogil:
    free(r.keys)
    free(r.sums)
    free(r.known.keys)


cdef void recent_clear(recent_t* r, int64_t arrivals) noexcept nogil:
    r.arrivals = arrivals
    if r.count > 0:
        r.count = 0
        seen_init(&r.known, r.room)


cdef bint is_listed(const here_t* l, Key key) noexcept nogil:
    cdef int64_t low = 0, high = l.count, middle
    while low < high:
        middle = (low + high) // 2
        if l.keys[middle] < key:
            low = middle + 1
        else:
            high = middle
    return low < l.count and l.keys[low] == key


cdef bint recent_update(recent_t* r, const here_t* l, const distribution_t* d, const int64_t* log, int64_t mask,
                        const int64_t* arrivals) noexcept nogil:
    cdef int64_t now = load_i64(arrivals), i
    cdef double weight
    cdef Key key
    if now - r.arrivals > r.room:
        return False
    for i in range(r.arrivals, now):
        key = load_i64(log + (i & mask))
        weight = weight_of(d, key)
        if weight <= 0.0 or is_listed(l, key) or seen_has(&r.known, key):
            continue
        if r.count == r.room:
            return False
        seen_add(&r.known, key)
        r.keys[r.count] = key
        r.sums[r.count] = weight + (r.sums[r.count - 1] if r.count > 0 else 0.0)
        r.count += 1
    if load_i64(arrivals) - r.arrivals > mask:              # places were taken again while we read
        return False
    r.arrivals = now
    return True


# --- picking ---------------------------------------------------------------------------------------------------------------------

cdef Key pick_listed(const here_t* l, const recent_t* recent, rng_t* r) noexcept nogil:
    cdef int64_t low = 0, high = recent.count - 1, middle
    cdef double mark
    if recent.count > 0:
        mark = next_fraction(r) * (l.weight + recent.sums[high])
        if l.count == 0 or mark >= l.weight:
            mark -= l.weight
            while low < high:
                middle = (low + high) // 2
                if recent.sums[middle] <= mark:
                    low = middle + 1
                else:
                    high = middle
            return recent.keys[low]
    if l.columns != NULL:
        return l.keys[column_key(l.columns, <uint64_t>l.count, next_number(r))]
    return l.keys[next_below(r, <uint64_t>l.count)]


cdef struct choice_t:           # each key takes the place of the one chosen so far with its share of the weight up to there
    Key key                     # (Chao, 1982, for one item)
    double total


cdef inline void consider(choice_t* c, Key key, const store_t* s, const distribution_t* d, const seen_t* seen, rng_t* r) noexcept nogil:
    cdef double weight
    if not is_here(s, key):
        return
    weight = weight_of(d, key)
    if weight <= 0.0 or seen_has(seen, key):
        return
    c.total += weight
    if next_fraction(r) * c.total < weight:
        c.key = key


cdef Key pick_exactly(const store_t* s, const distribution_t* d, const here_t* l, const recent_t* recent, const seen_t* seen,
                      rng_t* r) noexcept nogil:
    cdef choice_t c
    cdef int64_t i
    cdef Key key
    c.key = -1
    c.total = 0.0
    if l == NULL:
        for key in range(d.low, d.high):
            consider(&c, key, s, d, seen, r)
        return c.key
    for i in range(l.count):
        consider(&c, l.keys[i], s, d, seen, r)
    for i in range(recent.count):
        consider(&c, recent.keys[i], s, d, seen, r)
    return c.key


cdef bint any_here(const store_t* s, const distribution_t* d, const seen_t* seen) noexcept nogil:
    cdef Key key
    for key in range(d.low, d.high):
        if is_here(s, key) and not seen_has(seen, key):
            return True
    return False


# --- keys that have been drawn ----------------------------------------------------------------------------------------------

cdef inline int64_t first_place(const seen_t* seen, Key key) noexcept nogil:
    return <int64_t>((<uint64_t>key * <uint64_t>0x9e3779b97f4a7c15) >> 20) & seen.mask


cdef inline int64_t place_of(const seen_t* seen, Key key) noexcept nogil:
    """Where the key is, or would be put."""
    cdef int64_t i = first_place(seen, key)
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


cdef void seen_remove(seen_t* seen, Key key) noexcept nogil:
    """Those behind it that could not be put further in front move up (Knuth, The Art of Computer Programming, 6.4, algorithm R)."""
    cdef int64_t free_place, i
    if seen.mask < 0:
        return
    i = free_place = place_of(seen, key)
    if seen.keys[i] != key:
        return
    while True:
        i = (i + 1) & seen.mask
        if seen.keys[i] < 0:
            break
        if ((i - first_place(seen, seen.keys[i])) & seen.mask) >= ((i - free_place) & seen.mask):
            seen.keys[free_place] = seen.keys[i]
            free_place = i
    seen.keys[free_place] = -1
