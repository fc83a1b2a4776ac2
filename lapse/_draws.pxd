"""Random numbers, and random keys out of a distribution over [low, high).

Design: one xoshiro256++ per thread that draws (Blackman, Vigna, 2021), seeded through splitmix64 (Steele, Lea, Flood, 2014): no lock and no
shared cache line. A draw of a key takes one 64-bit number: the upper half of its product with the number of keys is a position, and
what is left over decides between the two keys of that column of the alias table (Walker, 1977; built as by Vose, 1991). A column is 8
bytes, so that the table of a vocabulary stays in the cache.
"""
from libc.math cimport exp
from libc.stdint cimport int64_t, uint32_t, uint64_t
from lapse._types cimport Key

cdef extern from *:
    """
    #ifndef LAPSE_DRAWS_H
    #define LAPSE_DRAWS_H
    #include <stdint.h>
    /* the upper half of a * b; the lower half goes to *low */
    static inline uint64_t lapse_multiply(uint64_t a, uint64_t b, uint64_t *low) {
        unsigned __int128 product = (unsigned __int128)a * b;
        *low = (uint64_t)product;
        return (uint64_t)(product >> 64);
    }
    #endif
    """
    uint64_t multiply "lapse_multiply"(uint64_t a, uint64_t b, uint64_t* low) noexcept nogil

cdef enum DistributionKind:
    UNIFORM
    LOG_UNIFORM
    WEIGHTS
    FUNCTION                    # a Python callable: see _sampling.pyx

cdef struct rng_t:
    uint64_t s[4]

cdef struct column_t:           # of an alias table
    uint32_t threshold          # of 2**32: below it the column's own key is drawn
    uint32_t other              # else this one

cdef struct distribution_t:
    int kind                    # DistributionKind
    Key low                     # keys are drawn out of [low, high)
    Key high
    uint64_t span               # high - low
    Key support                 # keys that can be drawn at all
    double scale                # LOG_UNIFORM: ln(span + 1)
    column_t* columns           # owned; WEIGHTS: span of them
    double* weights             # owned; WEIGHTS: a copy, when somebody asks for weight_of; else NULL


cdef inline uint64_t next_number(rng_t* r) noexcept nogil:
    cdef uint64_t a = r.s[0] + r.s[3]
    cdef uint64_t result = ((a << 23) | (a >> 41)) + r.s[0]
    cdef uint64_t t = r.s[1] << 17
    r.s[2] ^= r.s[0]
    r.s[3] ^= r.s[1]
    r.s[1] ^= r.s[2]
    r.s[0] ^= r.s[3]
    r.s[2] ^= t
    r.s[3] = (r.s[3] << 45) | (r.s[3] >> 19)
    return result


cdef inline double next_fraction(rng_t* r) noexcept nogil:
    """In [0, 1), 53 bits."""
    return <double>(next_number(r) >> 11) * (1.0 / 9007199254740992.0)


cdef inline uint64_t next_below(rng_t* r, uint64_t n) noexcept nogil:
    """In [0, n); off by less than n / 2**64."""
    cdef uint64_t rest
    return multiply(next_number(r), n, &rest)


cdef inline Key column_key(const column_t* columns, uint64_t n, uint64_t number) noexcept nogil:
    """The position that a random number draws out of an alias table of n columns."""
    cdef uint64_t rest
    cdef uint64_t i = multiply(number, n, &rest)
    return <Key>i if <uint32_t>(rest >> 32) < columns[i].threshold else <Key>columns[i].other


cdef inline Key draw_key(const distribution_t* d, rng_t* r) noexcept nogil:
    """One key; of any kind but FUNCTION."""
    cdef Key k
    if d.kind == UNIFORM:
        return d.low + <Key>next_below(r, d.span)
    if d.kind == WEIGHTS:
        return d.low + column_key(d.columns, d.span, next_number(r))
    k = <Key>exp(next_fraction(r) * d.scale) - 1
    return d.low + (k if k < <Key>d.span else <Key>d.span - 1)       # rounding


# Each with its own key: the same three numbers give the same stream, others an unrelated one.
cdef void seed_numbers(rng_t* r, uint64_t seed, uint64_t node, uint64_t stream) noexcept nogil
# n keys, of any kind but FUNCTION.
cdef void draw_keys(const distribution_t* d, rng_t* r, Key* keys, Py_ssize_t n) noexcept nogil
# What a key counts, up to a factor that is the same for all keys. WEIGHTS: only with d.weights. 0 for a key outside.
cdef double weight_of(const distribution_t* d, Key key) noexcept nogil
# The sum of weight_of over all keys.
cdef double total_weight(const distribution_t* d) noexcept nogil
# An alias table for n weights >= 0 of which one at least is above 0; n < 2**32. Returns memory for the caller to free; NULL: out of memory.
cdef column_t* build_columns(const double* weights, Py_ssize_t n) noexcept nogil
# Make *d. weights: high - low of them, for WEIGHTS; a copy is kept on request. 0, or ERR_MEMORY.
cdef int distribution_init(distribution_t* d, int kind, Key low, Key high, const double* weights, bint keep) noexcept nogil
cdef void distribution_free(distribution_t* d) noexcept nogil
