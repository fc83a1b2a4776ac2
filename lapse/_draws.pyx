# Design: see _draws.pxd. Nothing here waits, locks or knows of nodes.
from libc.math cimport log, log1p
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset
from lapse._types cimport ERR_MEMORY, Key

cdef double FULL = 4294967296.0     # thresholds are 32-bit fractions


cdef inline uint64_t splitmix(uint64_t* x) noexcept nogil:
    cdef uint64_t z
    x[0] += <uint64_t>0x9e3779b97f4a7c15
    z = x[0]
    z = (z ^ (z >> 30)) * <uint64_t>0xbf58476d1ce4e5b9
    z = (z ^ (z >> 27)) * <uint64_t>0x94d049bb133111eb
    return z ^ (z >> 31)


cdef void seed_numbers(rng_t* r, uint64_t seed, uint64_t node, uint64_t stream) noexcept nogil:
    cdef uint64_t x = seed
    cdef int i
    x = splitmix(&x) ^ node
    x = splitmix(&x) ^ stream
    for i in range(4):
        r.s[i] = splitmix(&x)
    if not (r.s[0] | r.s[1] | r.s[2] | r.s[3]):     # the one state that never moves
        r.s[0] = 1


cdef void draw_keys(const distribution_t* d, rng_t* r, Key* keys, Py_ssize_t n) noexcept nogil:
    cdef rng_t mine = r[0]                          # in registers, not behind a pointer that `keys` might alias
    cdef Key low = d.low
    cdef uint64_t span = d.span
    cdef const column_t* columns = d.columns
    cdef Py_ssize_t i
    if d.kind == UNIFORM:
        for i in range(n):
            keys[i] = low + <Key>next_below(&mine, span)
    elif d.kind == WEIGHTS:
        for i in range(n):
            keys[i] = low + column_key(columns, span, next_number(&mine))
    else:
        for i in range(n):
            keys[i] = draw_key(d, &mine)
    r[0] = mine


cdef double weight_of(const distribution_t* d, Key key) noexcept nogil:
    if not d.low <= key < d.high:
        return 0.0
    if d.kind == LOG_UNIFORM:                       # ln(k + 2) - ln(k + 1)
        return log1p(1.0 / <double>(key - d.low + 1))
    return d.weights[key - d.low] if d.kind == WEIGHTS else 1.0


cdef double total_weight(const distribution_t* d) noexcept nogil:
    cdef double total = 0.0
    cdef uint64_t i
    if d.kind == LOG_UNIFORM:
        return d.scale
    if d.kind != WEIGHTS:
        return <double>d.span
    for i in range(d.span):
        total += d.weights[i]
    return total


cdef column_t* build_columns(const double* weights, Py_ssize_t n) noexcept nogil:
    """Vose's method: columns that want more than they have give to those that have room.

    A key whose weight is 0 is never drawn, and one whose weight is above 0 always can be, whatever rounding does.
    """
    cdef column_t* columns = <column_t*>malloc(n * sizeof(column_t))
    cdef double* left = <double*>malloc(n * sizeof(double))
    cdef uint32_t* work = <uint32_t*>malloc(n * sizeof(uint32_t))
    cdef Py_ssize_t i, small = 0, large = n         # two stacks: work[0..small) and work[large..n)
    cdef uint32_t a, b, heaviest = 0
    cdef double total = 0.0
    if columns == NULL or left == NULL or work == NULL:
        free(columns)
        free(left)
        free(work)
        return NULL
    for i in range(n):
        total += weights[i]
        if weights[i] > weights[heaviest]:
            heaviest = <uint32_t>i
    for i in range(n):
        left[i] = weights[i] / total * <double>n
        if left[i] < 1.0:
            work[small] = <uint32_t>i
            small += 1
        else:
            large -= 1
            work[large] = <uint32_t>i
    while small > 0 and large < n:
        small -= 1
        a, b = work[small], work[large]
        set_column(columns + a, left[a], weights[a], b)
        left[b] -= 1.0 - left[a]
        if left[b] < 1.0:
            large += 1
            work[small] = b
            small += 1
    while large < n:                                # full
        a = work[large]
        set_column(columns + a, 1.0, 1.0, a)
        large += 1
    while small > 0:                                # full, but for rounding
        small -= 1
        a = work[small]
        set_column(columns + a, 1.0 if weights[a] > 0.0 else 0.0, weights[a], a if weights[a] > 0.0 else heaviest)
    free(left)
    free(work)
    return columns


cdef void set_column(column_t* column, double share, double weight, uint32_t other) noexcept nogil:
    cdef double threshold = share * FULL + 0.5
    column.other = other
    if weight <= 0.0 or share < 0.0:
        column.threshold = 0 if weight <= 0.0 else 1
    elif threshold >= FULL:
        column.threshold = 0xffffffff
    else:
        column.threshold = max(<uint32_t>threshold, <uint32_t>1)


cdef int distribution_init(distribution_t* d, int kind, Key low, Key high, const double* weights, bint keep) noexcept nogil:
    cdef uint64_t i
    memset(d, 0, sizeof(distribution_t))
    d.kind = kind
    d.low = low
    d.high = high
    d.span = <uint64_t>(high - low)
    d.support = high - low
    d.scale = log(<double>d.span + 1.0)
    if kind != WEIGHTS:
        return 0
    d.support = 0
    for i in range(d.span):
        d.support += weights[i] > 0.0
    d.columns = build_columns(weights, <Py_ssize_t>d.span)
    if d.columns == NULL:
        return ERR_MEMORY
    if keep:
        d.weights = <double*>malloc(d.span * sizeof(double))
        if d.weights == NULL:
            return ERR_MEMORY
        memcpy(d.weights, weights, d.span * sizeof(double))
    return 0


cdef void distribution_free(distribution_t* d) noexcept nogil:
    free(d.columns)
    free(d.weights)
    d.columns = NULL
    d.weights = NULL
