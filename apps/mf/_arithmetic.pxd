"""The arithmetic of matrix factorization: two rows of numbers in, two rows out.

Design: one body per number type, compiled for what the processor may offer and chosen when a trainer is made. A sum has four
accumulators of one vector each, since without -ffast-math the compiler must not split it by itself; so results differ in the last
bits from one kind of processor to the other. Rows are aligned to their numbers only.

Stochastic gradient descent on (x - w.h)^2 + lambda (|w|^2 / cells of the row + |h|^2 / cells of the column), the share of one
cell in the objective of Gemulla et al., Large-Scale Matrix Factorization with Distributed Stochastic Gradient Descent, KDD 2011.
"""
from libc.stdint cimport uint64_t

ctypedef void (*step_t)(void* w, void* h, size_t n, double x, double f, double shrink_w, double shrink_h) noexcept nogil

cdef extern from *:
    """
    #include <stddef.h>
    #include <stdint.h>
    #include <string.h>
    #if defined(__x86_64__) && defined(__GNUC__)
    #include <immintrin.h>
    #endif

    typedef struct {
        /* The prediction w.h. */
        double (*dot)(const void *w, const void *h, size_t n);
        /* One update of both rows: f times the residual of the prediction, shrink_w and shrink_h against the rows themselves. */
        void (*step)(void *w, void *h, size_t n, double x, double f, double shrink_w, double shrink_h);
        /* The same without changing the rows: what has to be added to them. */
        void (*delta)(const void *w, const void *h, void *dw, void *dh, size_t n, double x, double f, double shrink_w, double shrink_h);
    } mf_arithmetic_t;

    #define MF_SMALL(type) (16 / sizeof(type))      /* what is left at the end goes in vectors of 16 bytes */
    #define MF_DOT(type, vec, width, small, less)                                                                      \\
        vec s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};                                                                    \\
        type rest = 0;                                                                                                 \\
        size_t i = 0;                                                                                                  \\
        for (; i + 4 * width <= n; i += 4 * width) {                                                                   \\
            s0 += *(const vec *)(w + i) * *(const vec *)(h + i);                                                       \\
            s1 += *(const vec *)(w + i + width) * *(const vec *)(h + i + width);                                       \\
            s2 += *(const vec *)(w + i + 2 * width) * *(const vec *)(h + i + 2 * width);                               \\
            s3 += *(const vec *)(w + i + 3 * width) * *(const vec *)(h + i + 3 * width);                               \\
        }                                                                                                              \\
        for (; i + width <= n; i += width) s0 += *(const vec *)(w + i) * *(const vec *)(h + i);                        \\
        small t = {0};                                                                                                 \\
        for (; i + less <= n; i += less) t += *(const small *)(w + i) * *(const small *)(h + i);                       \\
        for (; i < n; i++) rest += w[i] * h[i];                                                                        \\
        s0 = (s0 + s1) + (s2 + s3);                                                                                    \\
        union { vec all; small part[sizeof(vec) / 16]; } sum = {s0};                                                   \\
        for (size_t half = sizeof(vec) / 32; half; half /= 2)                                                          \\
            for (size_t k = 0; k < half; k++) sum.part[k] += sum.part[k + half];                                       \\
        t += sum.part[0];                                                                                              \\
        for (size_t half = less / 2; half; half /= 2)                                                                  \\
            for (size_t k = 0; k < half; k++) t[k] += t[k + half];                                                     \\
        rest += t[0];

    #define MF_ARITHMETIC(name, type, width, target)                                                                   \\
        typedef type mf_##name##_vec __attribute__((vector_size(width * sizeof(type)), aligned(sizeof(type)), may_alias));\\
        typedef type mf_##name##_small __attribute__((vector_size(16), aligned(sizeof(type)), may_alias));             \\
        target static double mf_##name##_dot(const void *w_, const void *h_, size_t n) {                               \\
            const type *w = (const type *)w_, *h = (const type *)h_;                                                   \\
            MF_DOT(type, mf_##name##_vec, width, mf_##name##_small, MF_SMALL(type))                                    \\
            return (double)rest;                                                                                       \\
        }                                                                                                              \\
        target static void mf_##name##_step(void *w_, void *h_, size_t n, double x, double f, double shrink_w,         \\
                                            double shrink_h) {                                                         \\
            type *w = (type *)w_, *h = (type *)h_;                                                                     \\
            MF_DOT(type, mf_##name##_vec, width, mf_##name##_small, MF_SMALL(type))                                    \\
            type e = (type)(f * (x - (double)rest)), keep_w = (type)(1 - shrink_w), keep_h = (type)(1 - shrink_h);     \\
            for (i = 0; i + width <= n; i += width) {                                                                  \\
                mf_##name##_vec a = *(mf_##name##_vec *)(w + i), b = *(mf_##name##_vec *)(h + i);                      \\
                *(mf_##name##_vec *)(w + i) = a * keep_w + b * e;                                                      \\
                *(mf_##name##_vec *)(h + i) = b * keep_h + a * e;                                                      \\
            }                                                                                                          \\
            for (; i + MF_SMALL(type) <= n; i += MF_SMALL(type)) {                                                     \\
                mf_##name##_small a = *(mf_##name##_small *)(w + i), b = *(mf_##name##_small *)(h + i);                \\
                *(mf_##name##_small *)(w + i) = a * keep_w + b * e;                                                    \\
                *(mf_##name##_small *)(h + i) = b * keep_h + a * e;                                                    \\
            }                                                                                                          \\
            for (; i < n; i++) {                                                                                       \\
                type a = w[i], b = h[i];                                                                               \\
                w[i] = a * keep_w + b * e;                                                                             \\
                h[i] = b * keep_h + a * e;                                                                             \\
            }                                                                                                          \\
        }                                                                                                              \\
        target static void mf_##name##_delta(const void *w_, const void *h_, void *dw_, void *dh_, size_t n, double x, \\
                                             double f, double shrink_w, double shrink_h) {                             \\
            const type *w = (const type *)w_, *h = (const type *)h_;                                                   \\
            type *dw = (type *)dw_, *dh = (type *)dh_;                                                                 \\
            MF_DOT(type, mf_##name##_vec, width, mf_##name##_small, MF_SMALL(type))                                    \\
            type e = (type)(f * (x - (double)rest)), less_w = (type)shrink_w, less_h = (type)shrink_h;                 \\
            for (i = 0; i < n; i++) {                                                                                  \\
                dw[i] = h[i] * e - w[i] * less_w;                                                                      \\
                dh[i] = w[i] * e - h[i] * less_h;                                                                      \\
            }                                                                                                          \\
        }                                                                                                              \\
        static const mf_arithmetic_t mf_##name = {mf_##name##_dot, mf_##name##_step, mf_##name##_delta};

    MF_ARITHMETIC(f32, float, 4, )
    MF_ARITHMETIC(f64, double, 2, )
    #if defined(__x86_64__) && defined(__GNUC__)
    MF_ARITHMETIC(f32_avx2, float, 8, __attribute__((target("avx2,fma"))))
    MF_ARITHMETIC(f64_avx2, double, 4, __attribute__((target("avx2,fma"))))
    MF_ARITHMETIC(f32_avx512, float, 16, __attribute__((target("avx512f"))))
    MF_ARITHMETIC(f64_avx512, double, 8, __attribute__((target("avx512f"))))
    #endif

    #if defined(__x86_64__) && defined(__GNUC__)
    /* Rows of at most two vectors stay in registers; what a vector has too much is masked. */
    #define MF_SHORT(name, type, vec, mask, width, p)                                                                  \\
        __attribute__((target("avx512f"))) static void mf_##name##_short(void *w_, void *h_, size_t n, double x,       \\
                                                                double f, double shrink_w, double shrink_h) {          \\
            type *w = (type *)w_, *h = (type *)h_;                                                                     \\
            mask m0 = (mask)(n < width ? (1u << n) - 1 : (1ull << width) - 1);                                         \\
            mask m1 = (mask)(n > width ? (1ull << (n - width)) - 1 : 0);                                               \\
            vec a0 = _mm512_maskz_loadu_##p(m0, w), b0 = _mm512_maskz_loadu_##p(m0, h);                                \\
            vec a1 = _mm512_maskz_loadu_##p(m1, w + width), b1 = _mm512_maskz_loadu_##p(m1, h + width);                \\
            type dot = (type)_mm512_reduce_add_##p(_mm512_fmadd_##p(a0, b0, _mm512_mul_##p(a1, b1)));                  \\
            vec e = _mm512_set1_##p((type)(f * (x - (double)dot)));                                                    \\
            vec keep_w = _mm512_set1_##p((type)(1 - shrink_w)), keep_h = _mm512_set1_##p((type)(1 - shrink_h));        \\
            _mm512_mask_storeu_##p(w, m0, _mm512_fmadd_##p(a0, keep_w, _mm512_mul_##p(b0, e)));                        \\
            _mm512_mask_storeu_##p(h, m0, _mm512_fmadd_##p(b0, keep_h, _mm512_mul_##p(a0, e)));                        \\
            _mm512_mask_storeu_##p(w + width, m1, _mm512_fmadd_##p(a1, keep_w, _mm512_mul_##p(b1, e)));                \\
            _mm512_mask_storeu_##p(h + width, m1, _mm512_fmadd_##p(b1, keep_h, _mm512_mul_##p(a1, e)));                \\
        }                                                                                                              \\
        static const mf_arithmetic_t mf_##name##_short_rows = {mf_##name##_avx512_dot, mf_##name##_short, mf_##name##_avx512_delta};
    MF_SHORT(f32, float, __m512, __mmask16, 16, ps)
    MF_SHORT(f64, double, __m512d, __mmask8, 8, pd)
    #endif

    /* For rows of so many numbers. best: 0 any processor, 1 AVX2, 2 AVX-512; less where the processor has less */
    static const mf_arithmetic_t *mf_arithmetic(int is_double, size_t rank, int best) {
    #if defined(__x86_64__) && defined(__GNUC__)
        __builtin_cpu_init();
        if (best > 1 && __builtin_cpu_supports("avx512f") && rank <= (is_double ? 16 : 32))
            return is_double ? &mf_f64_short_rows : &mf_f32_short_rows;
        if (best > 1 && __builtin_cpu_supports("avx512f")) return is_double ? &mf_f64_avx512 : &mf_f32_avx512;
        if (best > 0 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
            return is_double ? &mf_f64_avx2 : &mf_f32_avx2;
    #endif
        (void)best, (void)rank;
        return is_double ? &mf_f64 : &mf_f32;
    }

    static inline void mf_prefetch(const char *row, size_t bytes) {
        for (size_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at, 1, 3);
        __builtin_prefetch(row + bytes - 1, 1, 3);
    }
    """
    ctypedef struct arithmetic_t "mf_arithmetic_t":
        double (*dot)(const void* w, const void* h, size_t n) noexcept nogil
        step_t step
        void (*delta)(const void* w, const void* h, void* dw, void* dh, size_t n, double x, double f, double shrink_w,
                      double shrink_h) noexcept nogil
    const arithmetic_t* arithmetic "mf_arithmetic"(int is_double, size_t rank, int best) noexcept nogil
    void prefetch "mf_prefetch"(const char* row, size_t bytes) noexcept nogil
