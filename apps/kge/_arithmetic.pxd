"""The arithmetic of knowledge-graph embeddings: scores, the logistic loss, gradients, AdaGrad.

Design: one body per number type, compiled for what the processor may offer and chosen when a trainer is made. A sum has four
accumulators of one vector each, since without -ffast-math the compiler must not split it by itself; all other loops run over arrays
that do not overlap (restrict) and have no dependence from one number to the next. Whoever uses this compiles with -fno-math-errno:
with errno to set, a square root is no vector operation. A *row* is what the parameter server keeps of a parameter: n values, then n
sums of squared gradients.

Both models are bilinear: the score of (s, r, o) is q.o with q a function of s and r, and s.p with p a function of r and o. So corrupted
triples of one side share q or p, each of their scores is one product, and their gradients meet in one vector.
ComplEx: Trouillon et al., Complex Embeddings for Simple Link Prediction, ICML 2016 (here real halves come first, then imaginary
halves); RESCAL: Nickel, Tresp and Kriegel, A Three-Way Model for Collective Learning on Multi-Relational Data, ICML 2011; AdaGrad:
Duchi, Hazan and Singer, Adaptive Subgradient Methods, JMLR 12, 2011.
"""

cdef extern from *:
    """
    #include <math.h>
    #include <stddef.h>
    #include <string.h>

    enum { KGE_CHUNK = 16 };

    typedef struct { double eta, gamma_entity, gamma_relation; } kge_step_t;

    typedef struct {
        double (*dot)(const void *a, const void *b, size_t n);
        void (*axpy)(double f, const void *x, void *y, size_t n);                                       /* y += f x */
        void (*add_change)(void *row, const void *from, const void *to, size_t n);                      /* row += to - from */
        void (*less)(void *from, const void *to, size_t n);                                             /* from = to - from */
        void (*adagrad)(void *row, const void *grad, size_t n, double eta, double gamma);
        /* Entities `rows` in the place of one: their scores against q, the rows updated in place, the gradient of q added to g. truth:
           1 when these are true triples, 0 when they are false. NULL is passed over. Returns the loss. */
        double (*entities)(void *const *rows, int m, double truth, const void *q, void *g, size_t n, const kge_step_t *step);
        /* ComplEx: the same with q (subject 0: of s and r) or p (subject 1: of r and o) and all gradients. s, r, o: rows. work: 2 n. */
        double (*complex_)(void *const *rows, int m, double truth, int subject, void *s, void *r, void *o, void *work, size_t n,
                          const kge_step_t *step);
        /* Lines first to first + lines of a relation's matrix, which are `row`: adds to q, writes their part of p. */
        void (*rescal_forward)(const void *row, size_t first, size_t lines, const void *s, const void *o, void *q, void *p, size_t n);
        /* Adds to the gradient of o, writes a part of that of s, and updates the row. */
        void (*rescal_backward)(void *row, size_t first, size_t lines, const void *s, const void *o, const void *gq, const void *gp,
                                void *ds, void *d_o, size_t n, const kge_step_t *step);
    } kge_arithmetic_t;

    #define KGE_PLAIN
    #define KGE_APART __attribute__((noinline))     /* inlined, what does not overlap would be forgotten */
    #define KGE_ARITHMETIC(name, type, width, root, target)                                                            \\
        typedef type kge_##name##_vec __attribute__((vector_size(width * sizeof(type)), aligned(sizeof(type)), may_alias));\\
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
        target static void kge_##name##_add_change(void *row_, const void *from_, const void *to_, size_t n) {         \\
            type *restrict row = (type *)row_;                                                                         \\
            const type *restrict from = (const type *)from_, *restrict to = (const type *)to_;                         \\
            for (size_t i = 0; i < n; i++) row[i] += to[i] - from[i];                                                  \\
        }                                                                                                              \\
        target static void kge_##name##_less(void *from_, const void *to_, size_t n) {                                 \\
            type *restrict from = (type *)from_;                                                                       \\
            const type *restrict to = (const type *)to_;                                                               \\
            for (size_t i = 0; i < n; i++) from[i] = to[i] - from[i];                                                  \\
        }                                                                                                              \\
        target static void kge_##name##_adagrad(void *row, const void *grad, size_t n, double eta_, double gamma_) {   \\
            type *restrict e = (type *)row, *restrict sums = e + n;                                                    \\
            const type *restrict d = (const type *)grad, eta = (type)eta_, gamma = (type)gamma_;                       \\
            for (size_t i = 0; i < n; i++) {                                                                           \\
                type x = d[i] + gamma * e[i], sum = sums[i] + x * x;                                                   \\
                sums[i] = sum;                                                                                         \\
                e[i] -= eta * x / root(sum);                                                                           \\
            }                                                                                                          \\
        }                                                                                                              \\
        target KGE_APART static void kge_##name##_entity(type *restrict e, type *restrict sums, const type *restrict q, type *restrict g,\\
                                                      size_t n, type f, type eta, type gamma) {                        \\
            for (size_t i = 0; i < n; i++) {                                                                           \\
                type x = f * q[i] + gamma * e[i], sum = sums[i] + x * x;                                               \\
                g[i] += f * e[i];                                                                                      \\
                sums[i] = sum;                                                                                         \\
                e[i] -= eta * x / root(sum);                                                                           \\
            }                                                                                                          \\
        }                                                                                                              \\
        target static double kge_##name##_entities(void *const *rows, int m, double truth, const void *q, void *g, size_t n,\\
                                                   const kge_step_t *step) {                                           \\
            double f[KGE_CHUNK], loss = 0, factors = 1;                                                                \\
            for (int i = 0; i < m; i++)                                                                                \\
                if (rows[i]) {                                                                                         \\
                    double x = (double)kge_##name##_product((const type *)rows[i], (const type *)q, n);                \\
                    double y = truth ? -x : x, e = exp(y > 0 ? -y : y);                                                \\
                    factors *= 1 + e;                   /* log(1 + exp(y)) = max(y, 0) + log(1 + exp(-|y|)) */         \\
                    loss += y > 0 ? y : y == y ? 0 : y;                                                                \\
                    f[i] = (y > 0 ? 1 : e) / (1 + e) * (truth ? -1 : 1);                                               \\
                }                                                                                                      \\
            for (int i = 0; i < m; i++)                                                                                \\
                if (rows[i]) kge_##name##_entity((type *)rows[i], (type *)rows[i] + n, (const type *)q, (type *)g, n, (type)f[i],\\
                                                 (type)step->eta, (type)step->gamma_entity);                           \\
            return loss + log(factors);                                                                                \\
        }                                                                                                              \\
        /* the numbers and sums of the entity that stays and of the relation, halves apart; turn: 1 under q = s r, -1 under p = conj(r) o */\\
        target KGE_APART static void kge_##name##_backward(type *restrict ar, type *restrict ai, type *restrict ar2, type *restrict ai2,\\
                                                 type *restrict rr, type *restrict ri, type *restrict rr2, type *restrict ri2,\\
                                                 const type *restrict gr, const type *restrict gi, size_t h, type turn, type eta,\\
                                                 type gamma, type gamma_r) {                                           \\
            for (size_t i = 0; i < h; i++) {                                                                           \\
                type x = rr[i] * gr[i] + turn * (ri[i] * gi[i]) + gamma * ar[i], x2 = ar2[i] + x * x;                  \\
                type y = rr[i] * gi[i] - turn * (ri[i] * gr[i]) + gamma * ai[i], y2 = ai2[i] + y * y;                  \\
                type u = ar[i] * gr[i] + ai[i] * gi[i] + gamma_r * rr[i], u2 = rr2[i] + u * u;                         \\
                type v = turn * (ar[i] * gi[i] - ai[i] * gr[i]) + gamma_r * ri[i], v2 = ri2[i] + v * v;                \\
                ar2[i] = x2;                                                                                           \\
                ai2[i] = y2;                                                                                           \\
                rr2[i] = u2;                                                                                           \\
                ri2[i] = v2;                                                                                           \\
                ar[i] -= eta * x / root(x2);                                                                           \\
                ai[i] -= eta * y / root(y2);                                                                           \\
                rr[i] -= eta * u / root(u2);                                                                           \\
                ri[i] -= eta * v / root(v2);                                                                           \\
            }                                                                                                          \\
        }                                                                                                              \\
        target KGE_APART static void kge_##name##_forward(const type *restrict ar, const type *restrict ai, const type *restrict rr,\\
                                                const type *restrict ri, type *restrict qr, type *restrict qi, size_t h, type turn) {\\
            for (size_t i = 0; i < h; i++) {                                                                           \\
                qr[i] = ar[i] * rr[i] - turn * (ai[i] * ri[i]);                                                        \\
                qi[i] = ai[i] * rr[i] + turn * (ar[i] * ri[i]);                                                        \\
            }                                                                                                          \\
        }                                                                                                              \\
        target static double kge_##name##_complex(void *const *rows, int m, double truth, int subject, void *s, void *r_, void *o,\\
                                                  void *work, size_t n, const kge_step_t *step) {                      \\
            type *a = (type *)(subject ? o : s), *r = (type *)r_, *q = (type *)work, *g = q + n, turn = subject ? (type)-1 : (type)1;\\
            size_t h = n / 2;                                                                                          \\
            int found = 0;                                                                                             \\
            double loss;                                                                                               \\
            kge_##name##_forward(a, a + h, r, r + h, q, q + h, h, turn);                                               \\
            memset(g, 0, n * sizeof(type));                                                                            \\
            loss = kge_##name##_entities(rows, m, truth, q, g, n, step);                                               \\
            for (int i = 0; i < m; i++) found += rows[i] != NULL;                                                      \\
            if (found) kge_##name##_backward(a, a + h, a + n, a + n + h, r, r + h, r + n, r + n + h, g, g + h, h, turn, (type)step->eta,\\
                                             (type)(found * step->gamma_entity), (type)(found * step->gamma_relation));\\
            return loss;                                                                                               \\
        }                                                                                                              \\
        target static void kge_##name##_rescal_forward(const void *row, size_t first, size_t lines, const void *s_, const void *o,\\
                                                       void *q_, void *p, size_t n) {                                  \\
            const type *line = (const type *)row, *s = (const type *)s_;                                               \\
            for (size_t i = first; i < first + lines; i++, line += n) {                                                \\
                ((type *)p)[i] = kge_##name##_product(line, (const type *)o, n);                                       \\
                kge_##name##_axpy((double)s[i], line, q_, n);                                                          \\
            }                                                                                                          \\
        }                                                                                                              \\
        target KGE_APART static void kge_##name##_line(type *restrict m, type *restrict sums, const type *restrict gq,    \\
                                                    const type *restrict o, type *restrict d_o, size_t n, type s, type gp, type eta,\\
                                                    type gamma) {                                                      \\
            for (size_t i = 0; i < n; i++) {                                                                           \\
                type x = s * gq[i] + gp * o[i] + gamma * m[i], sum = sums[i] + x * x;                                  \\
                d_o[i] += gp * m[i];                                                                                   \\
                sums[i] = sum;                                                                                         \\
                m[i] -= eta * x / root(sum);                                                                           \\
            }                                                                                                          \\
        }                                                                                                              \\
        target static void kge_##name##_rescal_backward(void *row, size_t first, size_t lines, const void *s_, const void *o,\\
                                                        const void *gq, const void *gp_, void *ds, void *d_o, size_t n,\\
                                                        const kge_step_t *step) {                                      \\
            type *m = (type *)row;                                                                                     \\
            const type *s = (const type *)s_, *gp = (const type *)gp_;                                                 \\
            for (size_t i = first; i < first + lines; i++, m += n) {                                                   \\
                ((type *)ds)[i] = kge_##name##_product(m, (const type *)gq, n);                                        \\
                kge_##name##_line(m, m + lines * n, (const type *)gq, (const type *)o, (type *)d_o, n, s[i], gp[i], (type)step->eta,\\
                                  (type)step->gamma_relation);                                                         \\
            }                                                                                                          \\
        }                                                                                                              \\
        static const kge_arithmetic_t kge_##name = {                                                                   \\
            kge_##name##_dot, kge_##name##_axpy, kge_##name##_add_change, kge_##name##_less, kge_##name##_adagrad, \\
            kge_##name##_entities, kge_##name##_complex, kge_##name##_rescal_forward, kge_##name##_rescal_backward};

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
    """
    enum:
        CHUNK "KGE_CHUNK"
    ctypedef struct step_t "kge_step_t":
        double eta
        double gamma_entity
        double gamma_relation
    ctypedef struct arithmetic_t "kge_arithmetic_t":
        double (*dot)(const void* a, const void* b, size_t n) noexcept nogil
        void (*axpy)(double f, const void* x, void* y, size_t n) noexcept nogil
        void (*add_change)(void* row, const void* from_, const void* to, size_t n) noexcept nogil
        void (*less)(void* from_, const void* to, size_t n) noexcept nogil
        void (*adagrad)(void* row, const void* grad, size_t n, double eta, double gamma) noexcept nogil
        double (*entities)(void** rows, int m, double truth, const void* q, void* g, size_t n, const step_t* step) noexcept nogil
        double (*complex_)(void** rows, int m, double truth, int subject, void* s, void* r, void* o, void* work, size_t n,
                                     const step_t* step) noexcept nogil
        void (*rescal_forward)(const void* row, size_t first, size_t lines, const void* s, const void* o, void* q, void* p,
                               size_t n) noexcept nogil
        void (*rescal_backward)(void* row, size_t first, size_t lines, const void* s, const void* o, const void* gq, const void* gp,
                                void* ds, void* d_o, size_t n, const step_t* step) noexcept nogil
    const arithmetic_t* arithmetic "kge_arithmetic"(int is_double, int best) noexcept nogil
