"""The arithmetic of skip-gram with negative sampling: one input vector and the output vectors that it is trained against.

Design: one body per number type, compiled for what the processor may offer and chosen when a trainer is made. Without -ffast-math the
compiler must not split a sum by itself, so the rows of a call have an accumulator of one vector each, up to eight at a time: the input
vector is read once for all of them, and their sums do not wait for each other. Rows are aligned to their numbers only.

The objective is that of Mikolov et al., Distributed Representations of Words and Phrases and their Compositionality, NIPS 2013:
log sigmoid(h.o) for the output vector o of the word in whose window it is, log sigmoid(-h.o) for those that were drawn. As in their
program, the input vector changes once, by the sum of what the output vectors as they were ask for.
"""
from libc.stdint cimport int64_t

cdef extern from *:
    """
    #include <math.h>
    #include <stddef.h>
    #include <stdint.h>
    #include <string.h>

    typedef struct {
        /* One step for input vector h and n output vectors; the first of these is the right one if `positive`, all others are
           wrong. They change in place. Returns the loss before the step: the sum of -log sigmoid. */
        double (*step)(void *h, void *const *rows, int n, size_t dim, double alpha, int positive);
        /* rows[i] += add[i] - less[i] */
        void (*shift)(void *row, const void *add, const void *less, size_t dim);
        /* row[i] -= less[i] */
        void (*subtract)(void *row, const void *less, size_t n);
    } w2v_arithmetic_t;

    enum { W2V_MOST_ROWS = 16, W2V_BINS = 1024 };
    #define W2V_REACH 16            /* beyond this, sigmoid is 0 or 1 in float32 */

    /* sigmoid(x) and log(1 + exp(-x)) at the borders of the bins of [-W2V_REACH, W2V_REACH]; between them a straight line, which is
       off by less than 2e-5 */
    static float w2v_table[W2V_BINS + 1][2];

    static void w2v_fill_table(void) {
        for (int i = 0; i <= W2V_BINS; i++) {
            double x = W2V_REACH * (2.0 * i / W2V_BINS - 1);
            w2v_table[i][0] = (float)(1 / (1 + exp(-x)));
            w2v_table[i][1] = (float)log1p(exp(-x));
        }
    }

    /* sigmoid(x); the loss of a right (positive) or wrong pair with this dot product is added to *loss */
    static inline double w2v_sigmoid(double x, int positive, double *loss) {
        double at = (x + W2V_REACH) * (W2V_BINS / (2.0 * W2V_REACH)), part;
        int bin;
        if (!(at >= 0)) { *loss += positive ? -x : 0; return 0; }           /* also what is no number */
        if (at >= W2V_BINS) { *loss += positive ? 0 : x; return 1; }
        bin = (int)at;
        part = at - bin;
        *loss += w2v_table[bin][1] + part * (w2v_table[bin + 1][1] - w2v_table[bin][1]) + (positive ? 0 : x);
        return w2v_table[bin][0] + part * (w2v_table[bin + 1][0] - w2v_table[bin][0]);
    }

    #define W2V_SMALL(type) (16 / sizeof(type))      /* what is left at the end goes in vectors of 16 bytes */

    #define W2V_ARITHMETIC(name, type, width, target)                                                                  \\
        typedef type w2v_##name##_vec __attribute__((vector_size(width * sizeof(type)), aligned(sizeof(type)), may_alias));\\
        typedef type w2v_##name##_small __attribute__((vector_size(16), aligned(sizeof(type)), may_alias));            \\
        target static inline __attribute__((always_inline)) void w2v_##name##_dots(                                    \\
                const type *h, void *const *rows, const int n, size_t dim, type *dots) {                               \\
            w2v_##name##_vec sums[8] = {{0}};                                                                          \\
            w2v_##name##_small ends[8] = {{0}};                                                                        \\
            size_t i = 0;                                                                                              \\
            for (; i + width <= dim; i += width) {                                                                     \\
                w2v_##name##_vec a = *(const w2v_##name##_vec *)(h + i);                                               \\
                for (int k = 0; k < n; k++) sums[k] += a * *(const w2v_##name##_vec *)((const type *)rows[k] + i);     \\
            }                                                                                                          \\
            for (; i + W2V_SMALL(type) <= dim; i += W2V_SMALL(type)) {                                                 \\
                w2v_##name##_small a = *(const w2v_##name##_small *)(h + i);                                           \\
                for (int k = 0; k < n; k++) ends[k] += a * *(const w2v_##name##_small *)((const type *)rows[k] + i);   \\
            }                                                                                                          \\
            for (int k = 0; k < n; k++) {                                                                              \\
                union { w2v_##name##_vec all; w2v_##name##_small part[sizeof(w2v_##name##_vec) / 16]; } sum = {sums[k]};\\
                w2v_##name##_small t = ends[k];                                                                        \\
                for (size_t half = sizeof(w2v_##name##_vec) / 32; half; half /= 2)                                     \\
                    for (size_t j = 0; j < half; j++) sum.part[j] += sum.part[j + half];                               \\
                t += sum.part[0];                                                                                      \\
                for (size_t half = W2V_SMALL(type) / 2; half; half /= 2)                                               \\
                    for (size_t j = 0; j < half; j++) t[j] += t[j + half];                                             \\
                dots[k] = t[0];                                                                                        \\
                for (size_t j = i; j < dim; j++) dots[k] += h[j] * ((const type *)rows[k])[j];                         \\
            }                                                                                                          \\
        }                                                                                                              \\
        target static double w2v_##name##_step(void *h_, void *const *rows, int n, size_t dim, double alpha,           \\
                                               int positive) {                                                         \\
            type *h = (type *)h_;                                                                                      \\
            type g[W2V_MOST_ROWS];                                                                                     \\
            double loss = 0;                                                                                           \\
            size_t i = 0;                                                                                              \\
            for (int k = 0; k < n; k += 8)                                                                             \\
                switch (n - k) {                                                                                       \\
                case 1: w2v_##name##_dots(h, rows + k, 1, dim, g + k); break;                                          \\
                case 2: w2v_##name##_dots(h, rows + k, 2, dim, g + k); break;                                          \\
                case 3: w2v_##name##_dots(h, rows + k, 3, dim, g + k); break;                                          \\
                case 4: w2v_##name##_dots(h, rows + k, 4, dim, g + k); break;                                          \\
                case 5: w2v_##name##_dots(h, rows + k, 5, dim, g + k); break;                                          \\
                case 6: w2v_##name##_dots(h, rows + k, 6, dim, g + k); break;                                          \\
                case 7: w2v_##name##_dots(h, rows + k, 7, dim, g + k); break;                                          \\
                default: w2v_##name##_dots(h, rows + k, 8, dim, g + k);                                                \\
                }                                                                                                      \\
            for (int k = 0; k < n; k++) {                                                                              \\
                int right = positive && k == 0;                                                                        \\
                g[k] = (type)(alpha * (right - w2v_sigmoid(g[k], right, &loss)));                                      \\
            }                                                                                                          \\
            for (; i + width <= dim; i += width) {                                                                     \\
                w2v_##name##_vec a = *(w2v_##name##_vec *)(h + i), sum = a;                                            \\
                for (int k = 0; k < n; k++) {                                                                          \\
                    w2v_##name##_vec *o = (w2v_##name##_vec *)((type *)rows[k] + i), b = *o;                           \\
                    sum += b * g[k];                                                                                   \\
                    *o = b + a * g[k];                                                                                 \\
                }                                                                                                      \\
                *(w2v_##name##_vec *)(h + i) = sum;                                                                    \\
            }                                                                                                          \\
            for (; i + W2V_SMALL(type) <= dim; i += W2V_SMALL(type)) {                                                 \\
                w2v_##name##_small a = *(w2v_##name##_small *)(h + i), sum = a;                                        \\
                for (int k = 0; k < n; k++) {                                                                          \\
                    w2v_##name##_small *o = (w2v_##name##_small *)((type *)rows[k] + i), b = *o;                       \\
                    sum += b * g[k];                                                                                   \\
                    *o = b + a * g[k];                                                                                 \\
                }                                                                                                      \\
                *(w2v_##name##_small *)(h + i) = sum;                                                                  \\
            }                                                                                                          \\
            for (; i < dim; i++) {                                                                                     \\
                type a = h[i], sum = a;                                                                                \\
                for (int k = 0; k < n; k++) {                                                                          \\
                    type *o = (type *)rows[k] + i, b = *o;                                                             \\
                    sum += b * g[k];                                                                                   \\
                    *o = b + a * g[k];                                                                                 \\
                }                                                                                                      \\
                h[i] = sum;                                                                                            \\
            }                                                                                                          \\
            return loss;                                                                                               \\
        }                                                                                                              \\
        target static void w2v_##name##_shift(void *row, const void *add, const void *less, size_t dim) {              \\
            type *r = (type *)row;                                                                                     \\
            const type *a = (const type *)add, *l = (const type *)less;                                                \\
            size_t i = 0;                                                                                              \\
            for (; i + width <= dim; i += width)                                                                       \\
                *(w2v_##name##_vec *)(r + i) += *(const w2v_##name##_vec *)(a + i) - *(const w2v_##name##_vec *)(l + i);\\
            for (; i < dim; i++) r[i] += a[i] - l[i];                                                                  \\
        }                                                                                                              \\
        static void w2v_##name##_subtract(void *row, const void *less, size_t n) {                                     \\
            for (size_t i = 0; i < n; i++) ((type *)row)[i] -= ((const type *)less)[i];                                \\
        }                                                                                                              \\
        static const w2v_arithmetic_t w2v_##name = {w2v_##name##_step, w2v_##name##_shift, w2v_##name##_subtract};

    W2V_ARITHMETIC(f32, float, 4, )
    W2V_ARITHMETIC(f64, double, 2, )
    #if defined(__x86_64__) && defined(__GNUC__)
    W2V_ARITHMETIC(f32_avx2, float, 8, __attribute__((target("avx2,fma"))))
    W2V_ARITHMETIC(f64_avx2, double, 4, __attribute__((target("avx2,fma"))))
    W2V_ARITHMETIC(f32_avx512, float, 16, __attribute__((target("avx512f"))))
    W2V_ARITHMETIC(f64_avx512, double, 8, __attribute__((target("avx512f"))))
    #endif

    /* best: 0 any processor, 1 AVX2, 2 AVX-512; less where the processor has less */
    static const w2v_arithmetic_t *w2v_arithmetic(int is_double, int best) {
    #if defined(__x86_64__) && defined(__GNUC__)
        __builtin_cpu_init();
        if (best > 1 && __builtin_cpu_supports("avx512f")) return is_double ? &w2v_f64_avx512 : &w2v_f32_avx512;
        if (best > 0 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
            return is_double ? &w2v_f64_avx2 : &w2v_f32_avx2;
    #endif
        (void)best;
        return is_double ? &w2v_f64 : &w2v_f32;
    }
    """
    ctypedef struct arithmetic_t "w2v_arithmetic_t":
        double (*step)(void* h, void** rows, int n, size_t dim, double alpha, int positive) noexcept nogil
        void (*shift)(void* row, const void* add, const void* less, size_t dim) noexcept nogil
        void (*subtract)(void* row, const void* less, size_t n) noexcept nogil
    int MOST_ROWS "W2V_MOST_ROWS"
    const arithmetic_t* arithmetic "w2v_arithmetic"(int is_double, int best) noexcept nogil
    void fill_table "w2v_fill_table"() noexcept nogil
