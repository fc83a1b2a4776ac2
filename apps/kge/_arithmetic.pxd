"""The arithmetic of knowledge-graph embeddings: scores, the logistic loss, gradients, AdaGrad.

Design: one body per number type, compiled for what the processor may offer and chosen when a trainer is made. A sum has four
accumulators of one vector each, since without -ffast-math the compiler must not split it by itself; all other loops run over arrays
that do not overlap (restrict) and have no dependence from one number to the next. A *row* is what the parameter server keeps of a
parameter: n values, then n sums of squared gradients. What is *far* is a copy of a row: it stays as it is, and what has to be added to
the parameter is written beside it.

Both models are bilinear: the score of (s, r, o) is q.o with q a function of s and r, and s.p with p a function of r and o. So q and p
are computed once per triple; each score of a corrupted triple is one product, and the gradients of all of them meet in two vectors.
ComplEx: Trouillon et al., Complex Embeddings for Simple Link Prediction, ICML 2016 (here real halves come first, then imaginary
halves); RESCAL: Nickel, Tresp and Kriegel, A Three-Way Model for Collective Learning on Multi-Relational Data, ICML 2011; AdaGrad:
Duchi, Hazan and Singer, Adaptive Subgradient Methods, JMLR 12, 2011.
"""

cdef extern from *:
    """
    #include <math.h>
    #include <stddef.h>
    #include <stdint.h>
    #include <string.h>

    enum { KGE_CHUNK = 16 };

    typedef struct {
        double (*dot)(const void *a, const void *b, size_t n);
        void (*axpy)(double f, const void *x, void *y, size_t n);                                       /* y += f x */
        /* m entities in the place of one: their scores against q, the loss of these as false triples, all rows updated in place,
           and the gradient of q added to g. A row that is NULL is passed over. Returns the loss. */
        double (*corrupt)(void *const *rows, int m, const void *q, void *g, size_t n, double eta, double gamma);
        /* The same for m far rows that lie one after the other. */
        double (*corrupt_far)(const void *rows, void *adds, int m, const void *q, void *g, size_t n, double eta, double gamma);
        void (*adagrad)(void *row, const void *grad, size_t n, double eta, double gamma);
        void (*adagrad_far)(const void *row, void *add, const void *grad, size_t n, double eta, double gamma);
        void (*complex_forward)(const void *s, const void *r, const void *o, void *q, void *p, size_t n);
        /* Out of the gradients of q and p those of s, r and o. */
        void (*complex_backward)(const void *s, const void *r, const void *o, const void *gq, const void *gp, void *ds, void *dr,
                                 void *d_o, size_t n);
        /* Lines first to first + lines of a relation's matrix, which are `row`: adds to q, writes their part of p. */
        void (*rescal_forward)(const void *row, size_t first, size_t lines, const void *s, const void *o, void *q, void *p, size_t n);
        /* Adds to the gradient of o, writes a part of that of s, and updates the row, or, where add is not NULL, writes to that. */
        void (*rescal_backward)(void *row, void *add, size_t first, size_t lines, const void *s, const void *o, const void *gq,
                                const void *gp, void *ds, void *d_o, size_t n, double eta, double gamma);
    } kge_arithmetic_t;

    #define KGE_PLAIN
    #if defined(__GNUC__) && !defined(__clang__)
    #define KGE_NO_ERRNO __attribute__((optimize("no-math-errno")))        /* a square root that sets errno is no vector operation */
    #else
    #define KGE_NO_ERRNO
    #endif

    /* log(1 + exp(x)) and its derivative, of m <= KGE_CHUNK numbers; errors below 1e-15 of the derivative and 4e-16 max(1, x) of the
       value. exp(-|x|) by a Taylor polynomial on [-ln 2 / 2, ln 2 / 2], log(1 + e) = 2 artanh(e / (2 + e)) by its series. */
    #define KGE_LOGISTIC(name, target)                                                                                 \\
        target static double kge_##name##_logistic(const double *restrict x_, double *restrict g, int m) {             \\
            double x[KGE_CHUNK] = {0}, t[KGE_CHUNK], r[KGE_CHUNK], e[KGE_CHUNK], loss[KGE_CHUNK], sum = 0;             \\
            int64_t bits[KGE_CHUNK];                                                                                   \\
            memcpy(x, x_, m * sizeof(double));                                                                         \\
            for (int i = 0; i < KGE_CHUNK; i++) {                                                                      \\
                double a = x[i] < 0 ? x[i] : -x[i];                                                                    \\
                a = a < -700 ? -700 : a;                                                                               \\
                t[i] = a * 1.4426950408889634 + 6755399441055744.0;                                                    \\
                double k = t[i] - 6755399441055744.0;                                                                  \\
                r[i] = (a - k * 0.693147180369123816490) - k * 1.90821492927058770002e-10;                             \\
            }                                                                                                          \\
            memcpy(bits, t, sizeof bits);                                                                              \\
            for (int i = 0; i < KGE_CHUNK; i++) bits[i] = (int64_t)(((uint64_t)bits[i] + 1023) << 52);                 \\
            memcpy(t, bits, sizeof bits);                                                                              \\
            for (int i = 0; i < KGE_CHUNK; i++) {                                                                      \\
                double p = 1.0 / 6227020800;                                                                           \\
                p = p * r[i] + 1.0 / 479001600;                                                                        \\
                p = p * r[i] + 1.0 / 39916800;                                                                         \\
                p = p * r[i] + 1.0 / 3628800;                                                                          \\
                p = p * r[i] + 1.0 / 362880;                                                                           \\
                p = p * r[i] + 1.0 / 40320;                                                                            \\
                p = p * r[i] + 1.0 / 5040;                                                                             \\
                p = p * r[i] + 1.0 / 720;                                                                              \\
                p = p * r[i] + 1.0 / 120;                                                                              \\
                p = p * r[i] + 1.0 / 24;                                                                               \\
                p = p * r[i] + 1.0 / 6;                                                                                \\
                p = p * r[i] + 0.5;                                                                                    \\
                p = p * r[i] + 1;                                                                                      \\
                p = p * r[i] + 1;                                                                                      \\
                e[i] = p * t[i];                                                                                       \\
            }                                                                                                          \\
            for (int i = 0; i < KGE_CHUNK; i++) {                                                                      \\
                double z = e[i] / (2 + e[i]), y = z * z, s = 1.0 / 31;                                                 \\
                s = s * y + 1.0 / 29;                                                                                  \\
                s = s * y + 1.0 / 27;                                                                                  \\
                s = s * y + 1.0 / 25;                                                                                  \\
                s = s * y + 1.0 / 23;                                                                                  \\
                s = s * y + 1.0 / 21;                                                                                  \\
                s = s * y + 1.0 / 19;                                                                                  \\
                s = s * y + 1.0 / 17;                                                                                  \\
                s = s * y + 1.0 / 15;                                                                                  \\
                s = s * y + 1.0 / 13;                                                                                  \\
                s = s * y + 1.0 / 11;                                                                                  \\
                s = s * y + 1.0 / 9;                                                                                   \\
                s = s * y + 1.0 / 7;                                                                                   \\
                s = s * y + 1.0 / 5;                                                                                   \\
                s = s * y + 1.0 / 3;                                                                                   \\
                s = s * y + 1;                                                                                         \\
                loss[i] = (x[i] > 0 ? x[i] : 0) + 2 * z * s;                                                           \\
                e[i] = (x[i] < 0 ? e[i] : 1) / (1 + e[i]);                                                             \\
            }                                                                                                          \\
            for (int i = 0; i < m; i++) {                                                                              \\
                sum += x_[i] == x_[i] ? loss[i] : x_[i];                                                               \\
                g[i] = e[i];                                                                                           \\
            }                                                                                                          \\
            return sum;                                                                                                \\
        }

    #define KGE_ARITHMETIC(name, type, width, root, target)                                                            \\
        typedef type kge_##name##_vec __attribute__((vector_size(width * sizeof(type)), aligned(sizeof(type)), may_alias));\\
        KGE_LOGISTIC(name, target)                                                                                     \\
        target static inline type kge_##name##_product(const type *a, const type *b, size_t n) {                       \\
            kge_##name##_vec s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};                                                   \\
            type rest = 0;                                                                                             \\
            size_t i = 0;                                                                                              \\
            for (; i + 4 * width <= n; i += 4 * width) {                                                               \\
                s0 += *(const kge_##name##_vec *)(a + i) * *(const kge_##name##_vec *)(b + i);                         \\
                s1 += *(const kge_##name##_vec *)(a + i + width) * *(const kge_##name##_vec *)(b + i + width);         \\
                s2 += *(const kge_##name##_vec *)(a + i + 2 * width) * *(const kge_##name##_vec *)(b + i + 2 * width); \\
                s3 += *(const kge_##name##_vec *)(a + i + 3 * width) * *(const kge_##name##_vec *)(b + i + 3 * width); \\
            }                                                                                                          \\
            for (; i + width <= n; i += width) s0 += *(const kge_##name##_vec *)(a + i) * *(const kge_##name##_vec *)(b + i);\\
            for (; i < n; i++) rest += a[i] * b[i];                                                                    \\
            s0 = (s0 + s1) + (s2 + s3);                                                                                \\
            for (size_t half = width / 2; half; half /= 2)                                                             \\
                for (size_t k = 0; k < half; k++) s0[k] += s0[k + half];                                               \\
            return rest + s0[0];                                                                                       \\
        }                                                                                                              \\
        target static double kge_##name##_dot(const void *a, const void *b, size_t n) {                                \\
            return (double)kge_##name##_product((const type *)a, (const type *)b, n);                                  \\
        }                                                                                                              \\
        target static void kge_##name##_axpy(double f_, const void *x_, void *y_, size_t n) {                          \\
            const type *restrict x = (const type *)x_, f = (type)f_;                                                   \\
            type *restrict y = (type *)y_;                                                                             \\
            for (size_t i = 0; i < n; i++) y[i] += f * x[i];                                                           \\
        }                                                                                                              \\
        target KGE_NO_ERRNO static void kge_##name##_step(type *restrict e, type *restrict sums, const type *restrict q, \\
                                                          type *restrict g, size_t n, type f, type eta, type gamma) {  \\
            for (size_t i = 0; i < n; i++) {                                                                           \\
                type x = f * q[i] + gamma * e[i], sum = sums[i] + x * x;                                               \\
                g[i] += f * e[i];                                                                                      \\
                sums[i] = sum;                                                                                         \\
                e[i] -= eta * x / root(sum);                                                                           \\
            }                                                                                                          \\
        }                                                                                                              \\
        target KGE_NO_ERRNO static void kge_##name##_step_far(const type *restrict e, const type *restrict sums,       \\
                                                              type *restrict add_e, type *restrict add_sums,           \\
                                                              const type *restrict q, type *restrict g, size_t n, type f, type eta,\\
                                                              type gamma) {                                            \\
            for (size_t i = 0; i < n; i++) {                                                                           \\
                type x = f * q[i] + gamma * e[i], square = x * x;                                                      \\
                g[i] += f * e[i];                                                                                      \\
                add_sums[i] = square;                                                                                  \\
                add_e[i] = -eta * x / root(sums[i] + square);                                                          \\
            }                                                                                                          \\
        }                                                                                                              \\
        target static double kge_##name##_corrupt(void *const *rows, int m, const void *q, void *g, size_t n, double eta,\\
                                                  double gamma) {                                                      \\
            double x[KGE_CHUNK] = {0}, f[KGE_CHUNK], loss;                                                                 \\
            int found = 0;                                                                                             \\
            for (int i = 0; i < m; i++)                                                                                \\
                if (rows[i]) x[found++] = (double)kge_##name##_product((const type *)rows[i], (const type *)q, n);     \\
            loss = kge_##name##_logistic(x, f, found);                                                                 \\
            found = 0;                                                                                                 \\
            for (int i = 0; i < m; i++)                                                                                \\
                if (rows[i]) kge_##name##_step((type *)rows[i], (type *)rows[i] + n, (const type *)q, (type *)g, n, (type)f[found++],\\
                                               (type)eta, (type)gamma);                                                \\
            return loss;                                                                                               \\
        }                                                                                                              \\
        target static double kge_##name##_corrupt_far(const void *rows, void *adds, int m, const void *q, void *g, size_t n, double eta,\\
                                                      double gamma) {                                                  \\
            double x[KGE_CHUNK] = {0}, f[KGE_CHUNK], loss;                                                                 \\
            const type *row = (const type *)rows;                                                                      \\
            type *add = (type *)adds;                                                                                  \\
            for (int i = 0; i < m; i++) x[i] = (double)kge_##name##_product(row + 2 * n * i, (const type *)q, n);      \\
            loss = kge_##name##_logistic(x, f, m);                                                                     \\
            for (int i = 0; i < m; i++, row += 2 * n, add += 2 * n)                                                    \\
                kge_##name##_step_far(row, row + n, add, add + n, (const type *)q, (type *)g, n, (type)f[i], (type)eta, (type)gamma);\\
            return loss;                                                                                               \\
        }                                                                                                              \\
        target KGE_NO_ERRNO static void kge_##name##_adagrad(void *row, const void *grad, size_t n, double eta_, double gamma_) {\\
            type *restrict e = (type *)row, *restrict sums = e + n;                                                    \\
            const type *restrict d = (const type *)grad, eta = (type)eta_, gamma = (type)gamma_;                       \\
            for (size_t i = 0; i < n; i++) {                                                                           \\
                type x = d[i] + gamma * e[i], sum = sums[i] + x * x;                                                   \\
                sums[i] = sum;                                                                                         \\
                e[i] -= eta * x / root(sum);                                                                           \\
            }                                                                                                          \\
        }                                                                                                              \\
        target KGE_NO_ERRNO static void kge_##name##_adagrad_far(const void *row, void *add, const void *grad, size_t n, double eta_,\\
                                                                 double gamma_) {                                      \\
            const type *restrict e = (const type *)row, *restrict sums = e + n;                                        \\
            const type *restrict d = (const type *)grad, eta = (type)eta_, gamma = (type)gamma_;                       \\
            type *restrict add_e = (type *)add, *restrict add_sums = add_e + n;                                        \\
            for (size_t i = 0; i < n; i++) {                                                                           \\
                type x = d[i] + gamma * e[i], square = x * x;                                                          \\
                add_sums[i] = square;                                                                                  \\
                add_e[i] = -eta * x / root(sums[i] + square);                                                          \\
            }                                                                                                          \\
        }                                                                                                              \\
        target static void kge_##name##_complex_forward(const void *s_, const void *r_, const void *o_, void *q_, void *p_, size_t n) {\\
            size_t h = n / 2;                                                                                          \\
            const type *restrict s = (const type *)s_, *restrict r = (const type *)r_, *restrict o = (const type *)o_; \\
            type *restrict q = (type *)q_, *restrict p = (type *)p_;                                                   \\
            for (size_t i = 0; i < h; i++) {                                                                           \\
                q[i] = s[i] * r[i] - s[h + i] * r[h + i];                                                              \\
                q[h + i] = s[i] * r[h + i] + s[h + i] * r[i];                                                          \\
                p[i] = r[i] * o[i] + r[h + i] * o[h + i];                                                              \\
                p[h + i] = r[i] * o[h + i] - r[h + i] * o[i];                                                          \\
            }                                                                                                          \\
        }                                                                                                              \\
        target static void kge_##name##_complex_backward(const void *s_, const void *r_, const void *o_, const void *gq_, \\
                                                         const void *gp_, void *ds_, void *dr_, void *do_, size_t n) { \\
            size_t h = n / 2;                                                                                          \\
            const type *restrict s = (const type *)s_, *restrict r = (const type *)r_, *restrict o = (const type *)o_; \\
            const type *restrict a = (const type *)gq_, *restrict b = (const type *)gp_;                               \\
            type *restrict ds = (type *)ds_, *restrict dr = (type *)dr_, *restrict d_o = (type *)do_;                  \\
            for (size_t i = 0; i < h; i++) {                                                                           \\
                ds[i] = r[i] * a[i] + r[h + i] * a[h + i];                                                             \\
                ds[h + i] = r[i] * a[h + i] - r[h + i] * a[i];                                                         \\
                dr[i] = (s[i] * a[i] + s[h + i] * a[h + i]) + (b[i] * o[i] + b[h + i] * o[h + i]);                     \\
                dr[h + i] = (s[i] * a[h + i] - s[h + i] * a[i]) + (b[i] * o[h + i] - b[h + i] * o[i]);                 \\
                d_o[i] = r[i] * b[i] - r[h + i] * b[h + i];                                                            \\
                d_o[h + i] = r[i] * b[h + i] + r[h + i] * b[i];                                                        \\
            }                                                                                                          \\
        }                                                                                                              \\
        target static void kge_##name##_rescal_forward(const void *row, size_t first, size_t lines, const void *s_, const void *o,\\
                                                       void *q_, void *p, size_t n) {                                  \\
            const type *line = (const type *)row, *s = (const type *)s_;                                               \\
            for (size_t i = first; i < first + lines; i++, line += n) {                                                \\
                ((type *)p)[i] = kge_##name##_product(line, (const type *)o, n);                                       \\
                kge_##name##_axpy((double)s[i], line, q_, n);                                                          \\
            }                                                                                                          \\
        }                                                                                                              \\
        target KGE_NO_ERRNO static void kge_##name##_line(type *restrict m, type *restrict sums, const type *restrict gq,\\
                                                          const type *restrict o, type *restrict d_o, size_t n, type s, type gp,\\
                                                          type eta, type gamma) {                                      \\
            for (size_t i = 0; i < n; i++) {                                                                           \\
                type x = s * gq[i] + gp * o[i] + gamma * m[i], sum = sums[i] + x * x;                                  \\
                d_o[i] += gp * m[i];                                                                                   \\
                sums[i] = sum;                                                                                         \\
                m[i] -= eta * x / root(sum);                                                                           \\
            }                                                                                                          \\
        }                                                                                                              \\
        target KGE_NO_ERRNO static void kge_##name##_line_far(const type *restrict m, const type *restrict sums,       \\
                                                              type *restrict add_m, type *restrict add_sums,           \\
                                                              const type *restrict gq, const type *restrict o,         \\
                                                              type *restrict d_o, size_t n, type s, type gp, type eta, type gamma) {\\
            for (size_t i = 0; i < n; i++) {                                                                           \\
                type x = s * gq[i] + gp * o[i] + gamma * m[i], square = x * x;                                         \\
                d_o[i] += gp * m[i];                                                                                   \\
                add_sums[i] = square;                                                                                  \\
                add_m[i] = -eta * x / root(sums[i] + square);                                                          \\
            }                                                                                                          \\
        }                                                                                                              \\
        target static void kge_##name##_rescal_backward(void *row, void *add, size_t first, size_t lines, const void *s_, const void *o_,\\
                                                        const void *gq_, const void *gp_, void *ds_, void *do_, size_t n, double eta,\\
                                                        double gamma) {                                                \\
            type *m = (type *)row, *to = (type *)add, *ds = (type *)ds_, *d_o = (type *)do_;                           \\
            const type *s = (const type *)s_, *o = (const type *)o_, *gq = (const type *)gq_, *gp = (const type *)gp_; \\
            size_t all = lines * n;                                                                                    \\
            for (size_t i = first; i < first + lines; i++, m += n) {                                                   \\
                ds[i] = kge_##name##_product(m, gq, n);                                                                \\
                if (to) {                                                                                              \\
                    kge_##name##_line_far(m, m + all, to, to + all, gq, o, d_o, n, s[i], gp[i], (type)eta, (type)gamma);\\
                    to += n;                                                                                           \\
                } else {                                                                                               \\
                    kge_##name##_line(m, m + all, gq, o, d_o, n, s[i], gp[i], (type)eta, (type)gamma);                 \\
                }                                                                                                      \\
            }                                                                                                          \\
        }                                                                                                              \\
        static const kge_arithmetic_t kge_##name = {                                                                   \\
            kge_##name##_dot, kge_##name##_axpy, kge_##name##_corrupt, kge_##name##_corrupt_far, kge_##name##_adagrad, \\
            kge_##name##_adagrad_far, kge_##name##_complex_forward, kge_##name##_complex_backward, kge_##name##_rescal_forward,\\
            kge_##name##_rescal_backward};

    KGE_ARITHMETIC(f32, float, 4, sqrtf, KGE_PLAIN)
    KGE_ARITHMETIC(f64, double, 2, sqrt, KGE_PLAIN)
    #if defined(__x86_64__) && defined(__GNUC__)
    #define KGE_AVX2 __attribute__((target("avx2,fma")))
    #define KGE_AVX512 __attribute__((target("avx512f,avx512dq,avx512vl,fma")))
    KGE_ARITHMETIC(f32_avx2, float, 8, sqrtf, KGE_AVX2)
    KGE_ARITHMETIC(f64_avx2, double, 4, sqrt, KGE_AVX2)
    KGE_ARITHMETIC(f32_avx512, float, 16, sqrtf, KGE_AVX512)
    KGE_ARITHMETIC(f64_avx512, double, 8, sqrt, KGE_AVX512)
    #endif

    /* best: 0 any processor, 1 AVX2, 2 AVX-512; less where the processor has less */
    static const kge_arithmetic_t *kge_arithmetic(int is_double, int best) {
    #if defined(__x86_64__) && defined(__GNUC__)
        __builtin_cpu_init();
        if (best > 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
            return is_double ? &kge_f64_avx512 : &kge_f32_avx512;
        if (best > 0 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
            return is_double ? &kge_f64_avx2 : &kge_f32_avx2;
    #endif
        (void)best;
        return is_double ? &kge_f64 : &kge_f32;
    }
    static double kge_logistic(const double *x, double *g, int m) { return kge_f64_logistic(x, g, m); }
    """
    enum:
        CHUNK "KGE_CHUNK"
    ctypedef struct arithmetic_t "kge_arithmetic_t":
        double (*dot)(const void* a, const void* b, size_t n) noexcept nogil
        void (*axpy)(double f, const void* x, void* y, size_t n) noexcept nogil
        double (*corrupt)(void** rows, int m, const void* q, void* g, size_t n, double eta, double gamma) noexcept nogil
        double (*corrupt_far)(const void* rows, void* adds, int m, const void* q, void* g, size_t n, double eta, double gamma) noexcept nogil
        void (*adagrad)(void* row, const void* grad, size_t n, double eta, double gamma) noexcept nogil
        void (*adagrad_far)(const void* row, void* add, const void* grad, size_t n, double eta, double gamma) noexcept nogil
        void (*complex_forward)(const void* s, const void* r, const void* o, void* q, void* p, size_t n) noexcept nogil
        void (*complex_backward)(const void* s, const void* r, const void* o, const void* gq, const void* gp, void* ds, void* dr,
                                 void* d_o, size_t n) noexcept nogil
        void (*rescal_forward)(const void* row, size_t first, size_t lines, const void* s, const void* o, void* q, void* p,
                               size_t n) noexcept nogil
        void (*rescal_backward)(void* row, void* add, size_t first, size_t lines, const void* s, const void* o, const void* gq,
                                const void* gp, void* ds, void* d_o, size_t n, double eta, double gamma) noexcept nogil
    const arithmetic_t* arithmetic "kge_arithmetic"(int is_double, int best) noexcept nogil
    double logistic "kge_logistic"(const double* x, double* g, int m) noexcept nogil
