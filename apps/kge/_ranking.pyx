# Design: a triple's rank is one more than the number of entities that score higher in the place of its object (or subject). Entities lie
# in panels of LANES, number by number, so that one vector holds the same number of neighbouring entities: a block of queries is multiplied
# with a tile of panels without a sum across a vector, and its scores are counted while they are in the cache. All scores, the one
# of the triple itself and those that are filtered out among them, come from the same instructions, so equal vectors get equal scores.
from libc.stdint cimport int32_t, int64_t
from libc.stdlib cimport free, malloc

import numpy as np

cdef extern from *:
    """
    #include <stddef.h>
    #include <stdint.h>

    enum { KGE_BLOCK = 8, KGE_LANES = 16 };

    typedef struct {
        /* Scores of KGE_BLOCK queries against so many panels; out: a line of `stride` numbers per query. */
        void (*score)(const void *panels, size_t count, const void *queries, size_t n, void *out, size_t stride);
        /* How many of n scores are not below the limit, or are no number; and how many are the limit. */
        void (*count)(const void *scores, size_t n, double limit, int64_t *not_below, int64_t *equal);
    } kge_ranking_t;

    #define KGE_RANKING(name, type, counter, at_once, target)                                                          \\
        typedef type kge_rank_##name##_vec __attribute__((vector_size(KGE_LANES * sizeof(type)), aligned(sizeof(type)), may_alias));\\
        target static void kge_rank_##name##_score(const void *panels, size_t count, const void *queries, size_t n, void *out_,\\
                                                   size_t stride) {                                                    \\
            typedef kge_rank_##name##_vec vec;                                                                         \\
            for (size_t c = 0; c < count; c++) {                                                                       \\
                const type *panel = (const type *)panels + c * n * KGE_LANES;                                          \\
                for (size_t first = 0; first < KGE_BLOCK; first += at_once) {                                          \\
                    const type *q = (const type *)queries + first * n;                                                 \\
                    type *out = (type *)out_ + first * stride + c * KGE_LANES;                                         \\
                    vec sums[at_once] = {{0}};                                                                         \\
                    for (size_t k = 0; k < n; k++) {                                                                   \\
                        vec e = *(const vec *)(panel + k * KGE_LANES);                                                 \\
                        for (size_t i = 0; i < at_once; i++) sums[i] += e * q[i * n + k];                              \\
                    }                                                                                                  \\
                    for (size_t i = 0; i < at_once; i++) *(vec *)(out + i * stride) = sums[i];                         \\
                }                                                                                                      \\
            }                                                                                                          \\
        }                                                                                                              \\
        target static void kge_rank_##name##_count(const void *scores_, size_t n, double limit_, int64_t *not_below, int64_t *equal) {\\
            const type *scores = (const type *)scores_, limit = (type)limit_;                                          \\
            counter above = 0, same = 0;                                                                               \\
            for (size_t i = 0; i < n; i++) {                                                                           \\
                above += !(scores[i] < limit);                                                                         \\
                same += scores[i] == limit;                                                                            \\
            }                                                                                                          \\
            *not_below += above;                                                                                       \\
            *equal += same;                                                                                            \\
        }                                                                                                              \\
        static const kge_ranking_t kge_rank_##name = {kge_rank_##name##_score, kge_rank_##name##_count};

    #define KGE_RANK_PLAIN
    KGE_RANKING(f32, float, int32_t, 2, KGE_RANK_PLAIN)
    KGE_RANKING(f64, double, int64_t, 1, KGE_RANK_PLAIN)
    #if defined(__x86_64__) && defined(__GNUC__)
    KGE_RANKING(f32_avx2, float, int32_t, 4, __attribute__((target("avx2,fma"))))
    KGE_RANKING(f64_avx2, double, int64_t, 2, __attribute__((target("avx2,fma"))))
    KGE_RANKING(f32_avx512, float, int32_t, 8, __attribute__((target("avx512f,avx512dq,avx512vl,fma"))))
    KGE_RANKING(f64_avx512, double, int64_t, 8, __attribute__((target("avx512f,avx512dq,avx512vl,fma"))))
    #endif

    static const kge_ranking_t *kge_ranking(int is_double, int best) {
    #if defined(__x86_64__) && defined(__GNUC__)
        __builtin_cpu_init();
        if (best > 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
            return is_double ? &kge_rank_f64_avx512 : &kge_rank_f32_avx512;
        if (best > 0 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
            return is_double ? &kge_rank_f64_avx2 : &kge_rank_f32_avx2;
    #endif
        (void)best;
        return is_double ? &kge_rank_f64 : &kge_rank_f32;
    }
    """
    enum:
        BLOCK "KGE_BLOCK"
        LANES "KGE_LANES"
    ctypedef struct ranking_t "kge_ranking_t":
        void (*score)(const void* panels, size_t count, const void* queries, size_t n, void* out, size_t stride) noexcept nogil
        void (*count)(const void* scores, size_t n, double limit, int64_t* not_below, int64_t* equal) noexcept nogil
    const ranking_t* ranking "kge_ranking"(int is_double, int best) noexcept nogil

cdef enum:
    TILE = 32                   # panels whose scores are counted together

ctypedef fused number:
    float
    double


def panels_for(Py_ssize_t entities, Py_ssize_t dim, dtype):
    """Return room for so many vectors, zeros: [panels, dim, entities of a panel]."""
    return np.zeros(((entities + LANES - 1) // LANES, dim, LANES), dtype=dtype)


def pack(number[:, :, ::1] panels, const number[:, :] vectors, Py_ssize_t first):
    """Put vectors of entities `first` and following into their panels. Threads may do so at once with different entities."""
    cdef Py_ssize_t i, k
    if first < 0 or first + vectors.shape[0] > panels.shape[0] * LANES or vectors.shape[1] != panels.shape[1]:
        raise ValueError("vectors that do not fit the panels")
    with nogil:
        for i in range(vectors.shape[0]):
            for k in range(vectors.shape[1]):
                panels[(first + i) // LANES, k, (first + i) % LANES] = vectors[i, k]


def count_ranks(const number[:, :, ::1] panels, Py_ssize_t entities, const number[:, ::1] queries, const int32_t[::1] targets,
                const int64_t[::1] begins, const int64_t[::1] ends, const int32_t[::1] known, int instructions=2):
    """Count for each query the entities that score higher than its target, and those, others than it, that score the same.

    known[begins[i]:ends[i]], in ascending order: the entities that do not count for query i in the filtered setting. Returns int64
    [queries, 4]: higher, same, and both filtered. Scores that are no numbers count as higher. Releases the GIL.
    """
    cdef const ranking_t* how = ranking(number is double, instructions)
    cdef Py_ssize_t count = queries.shape[0], n = queries.shape[1], tiles = (panels.shape[0] + TILE - 1) // TILE, t, b, i, first, size, width
    cdef int64_t[:, ::1] out = np.zeros((count, 4), dtype=np.int64)
    cdef int64_t[::1] at = np.array(begins, dtype=np.int64)
    cdef number[:, ::1] scores = np.empty((BLOCK, TILE * LANES), dtype=np.asarray(panels).dtype)
    cdef number[:, ::1] block = np.zeros(((count + BLOCK - 1) // BLOCK * BLOCK, n), dtype=np.asarray(panels).dtype)
    cdef number[::1] limits = np.empty(count, dtype=np.asarray(panels).dtype)
    cdef number[:, ::1] same = np.zeros((BLOCK, n), dtype=np.asarray(panels).dtype)
    cdef int64_t end, lane
    cdef number score
    if panels.shape[1] != n or panels.shape[0] * LANES < entities or len(targets) != count or len(begins) != count or len(ends) != count:
        raise ValueError("queries, targets and panels that do not belong together")
    with nogil:
        for i in range(count):
            block[i] = queries[i]
            same[:, :] = queries[i]
            how.score(&panels[targets[i] // LANES, 0, 0], 1, &same[0, 0], n, &scores[0, 0], TILE * LANES)
            limits[i] = scores[0, targets[i] % LANES]
        for t in range(tiles):
            first = t * TILE
            size = min(TILE, panels.shape[0] - first)
            end = min(entities, (first + size) * LANES)
            width = end - first * LANES
            b = 0
            while b < count:
                how.score(&panels[first, 0, 0], size, &block[b, 0], n, &scores[0, 0], TILE * LANES)
                for i in range(b, min(b + BLOCK, count)):
                    how.count(&scores[i - b, 0], width, limits[i], &out[i, 0], &out[i, 1])
                    while at[i] < ends[i] and known[at[i]] < end:
                        lane = known[at[i]] - first * LANES
                        at[i] += 1
                        if known[at[i] - 1] == targets[i]:
                            continue
                        score = scores[i - b, lane]
                        out[i, 2] += not score < limits[i]
                        out[i, 3] += score == limits[i]
                b += BLOCK
        for i in range(count):          # the target itself is counted as the same, or, when it is no number, as higher
            out[i, 0] -= out[i, 1] if limits[i] == limits[i] else 1
            out[i, 1] -= limits[i] == limits[i]
            out[i, 2], out[i, 3] = out[i, 0] - (out[i, 2] - out[i, 3]), out[i, 1] - out[i, 3]
    return np.asarray(out)
