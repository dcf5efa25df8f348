// The operations of an encoder layer besides its linear layers, on a CPU, in bfloat16 with float32 inside: attention,
// dropout + residual + LayerNorm, GELU. One pass over memory each. `native.py` compiles this file; `operations.py` calls it.
//
// Shapes: B examples, L tokens, A heads, D head size, H = A * D, T = B * L. Matrices are dense and row-major, except `rows`.
// Threads are those of PyTorch's OpenMP. One thread computes a row or head, so results do not depend on their number,
// except the gradients of LayerNorm's parameters, which are summed for each thread and then in thread order.

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bf16;
typedef float vec __attribute__((vector_size(64)));
typedef int32_t ivec __attribute__((vector_size(64)));
typedef uint32_t uvec __attribute__((vector_size(64)));
typedef uint16_t hvec __attribute__((vector_size(32)));
enum { W = 16 };    // floats in a vector
enum { ROWS = 4 };  // queries computed together

static inline vec load(const float *p) {
    vec x;
    memcpy(&x, p, sizeof x);
    return x;
}

static inline void store(float *p, vec x) { memcpy(p, &x, sizeof x); }

static inline vec widen(const bf16 *p) {
    hvec h;
    memcpy(&h, p, sizeof h);
    uvec bits = __builtin_convertvector(h, uvec) << 16;
    return (vec)bits;
}

static inline void narrow(bf16 *p, vec x) {  // rounds to nearest even; NaN stays NaN
    uvec bits = (uvec)x;
    uvec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    ivec nan = (ivec)(bits & 0x7fffffff) > 0x7f800000;
    rounded = (rounded & ~(uvec)nan) | ((uvec)nan & 0x7fc0);
    hvec h = __builtin_convertvector(rounded, hvec);
    memcpy(p, &h, sizeof h);
}

static inline float total(vec x) {
    float sum = 0;
    for (int i = 0; i < W; i++) sum += x[i];
    return sum;
}

// Dropout: a hash of (seed, n) decides whether element n is kept, so the backward pass needs no stored mask.
typedef struct {
    uint32_t first, second;
    int32_t threshold;  // probability * 2^31
    float scale;        // factor of kept elements
} dropout;

static dropout make_dropout(uint64_t seed, double p) {
    int32_t threshold = p < 1 ? (int32_t)(p * 2147483648.0) : INT32_MAX;
    return (dropout){(uint32_t)seed, (uint32_t)(seed >> 32), threshold, p < 1 ? (float)(1 / (1 - p)) : 0};
}

static const uvec COUNT = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

static inline vec apply_dropout(const dropout *d, uint32_t n, vec x) {  // x holds elements n, n + 1, ...
    if (!d->threshold) return x;
    uvec h = COUNT + n + d->first;
    h = (h ^ (h >> 16)) * 0x7feb352d + d->second;
    h = (h ^ (h >> 15)) * 0x846ca68b;
    h ^= h >> 16;
    ivec keep = (ivec)(h >> 1) >= d->threshold;
    return (vec)((ivec)(x * d->scale) & keep);
}

// e^x for x <= 0, relative error 2e-7; 0 below -87
static inline vec exponential(vec x) {
    ivec low = x < -87.0f;
    x = (vec)(((ivec)x & ~low) | ((ivec)(vec){} & low));
    vec n = x * 1.44269504f - 0.5f;
    ivec whole = __builtin_convertvector(n, ivec);  // truncation rounds to nearest, as n <= 0
    vec w = __builtin_convertvector(whole, vec);
    vec r = x - w * 0.693359375f + w * 2.12194440e-4f;
    vec y = 1.9875691500e-4f * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    y = (vec)((ivec)y + (whole << 23));
    return (vec)((ivec)y & ~low);
}

// ---------------------------------------------------------------------------------------------------- attention

// A matrix of rows of D numbers for each example and head: the strides between examples and rows, in elements. The stride
// between heads is D.
typedef struct {
    bf16 *at;
    int64_t example, row;
} rows;

static inline bf16 *of_head(rows from, int example, int head, int D) {
    return from.at + example * from.example + (int64_t)head * D;
}

typedef struct {
    int Q, L, keys;           // queries; tokens; tokens padded to whole vectors
    float *q, *c, *dq;        // (Q padded to whole ROWS, D), zeros after Q; c: gradient of the context
    float *k, *v, *dk, *dv;   // (keys, D), zeros after L; v and dv are k and dk if the keys are the values
    float *k_t, *v_t;         // (D, keys)
    float *mask;              // (keys)
    float *p, *s;             // (ROWS, keys)
    float *out;               // (ROWS, D)
} head;

static inline int padded(int n, int to) { return (n + to - 1) / to * to; }

static float *take(float **rest, size_t n) {
    float *p = *rest;
    *rest += n;
    return p;
}

static head allocate_head(int Q, int L, int D, float **memory) {
    head h = {.Q = Q, .L = L, .keys = padded(L, W)};
    size_t keys = h.keys, of_q = (size_t)padded(Q, ROWS) * D, of_k = keys * D;
    // The size of each part is a multiple of a vector.
    size_t bytes = (3 * of_q + 6 * of_k + (1 + 2 * ROWS) * keys + (size_t)ROWS * D) * sizeof(float);
    float *at = *memory = aligned_alloc(sizeof(vec), bytes);
    if (!at) return h;
    memset(at, 0, bytes);
    float **queries[] = {&h.q, &h.c, &h.dq}, **tokens[] = {&h.k, &h.v, &h.dk, &h.dv, &h.k_t, &h.v_t};
    for (int i = 0; i < 3; i++) *queries[i] = take(&at, of_q);
    for (int i = 0; i < 6; i++) *tokens[i] = take(&at, of_k);
    h.mask = take(&at, keys);
    h.p = take(&at, ROWS * keys), h.s = take(&at, ROWS * keys);
    h.out = take(&at, (size_t)ROWS * D);
    return h;
}

static inline void gather(float *to, const bf16 *from, int count, int D, int64_t row, float scale) {
    for (int i = 0; i < count; i++)
        for (int e = 0; e < D; e += W) store(to + i * D + e, widen(from + i * row + e) * scale);
}

static inline void scatter(bf16 *to, const float *from, int count, int D, int64_t row, float scale) {
    for (int i = 0; i < count; i++)
        for (int e = 0; e < D; e += W) narrow(to + i * row + e, load(from + i * D + e) * scale);
}

static inline void transpose(float *to, const float *from, int L, int keys, int D) {
    for (int block = 0; block < D; block += W)  // keeps the written lines in the cache
        for (int i = 0; i < L; i++)
            for (int e = block; e < block + W; e++) to[e * keys + i] = from[i * D + e];
}

// Reads the queries, keys, values and mask of a head; returns whether the keys are the values.
static inline int read_head(head *h, rows q, rows k, rows v, const bf16 *mask, float scale, int b, int a, int D) {
    int same = k.at == v.at;
    gather(h->q, of_head(q, b, a, D), h->Q, D, q.row, scale);
    gather(h->k, of_head(k, b, a, D), h->L, D, k.row, 1);
    if (same) h->v = h->k, h->v_t = h->k_t, h->dv = h->dk;
    else gather(h->v, of_head(v, b, a, D), h->L, D, v.row, 1);
    transpose(h->k_t, h->k, h->L, h->keys, D);
    for (int j = 0; j < h->keys; j++) {
        uint32_t bits = mask && j < h->L ? (uint32_t)mask[(size_t)b * h->L + j] << 16 : 0;
        memcpy(h->mask + j, &bits, 4);
        if (j >= h->L) h->mask[j] = -INFINITY;
    }
    return same;
}

// out (ROWS, keys) = a (ROWS, D) @ b_t (D, keys) + start (keys)
static inline void into_keys(float *out, const float *a, const float *b_t, const float *start, int keys, int D) {
    for (int j = 0; j < keys; j += W) {
        vec first = start ? load(start + j) : (vec){};
        vec sum[ROWS];
        for (int r = 0; r < ROWS; r++) sum[r] = first;
        for (int e = 0; e < D; e++) {
            vec b = load(b_t + (size_t)e * keys + j);
            for (int r = 0; r < ROWS; r++) sum[r] += a[r * D + e] * b;
        }
        for (int r = 0; r < ROWS; r++) store(out + (size_t)r * keys + j, sum[r]);
    }
}

// out (ROWS, D) = p (ROWS, keys) @ b (keys, D)
static inline void from_keys(float *out, const float *p, const float *b, int L, int keys, int D) {
    for (int e = 0; e < D; e += W) {
        vec sum[ROWS] = {};
        for (int j = 0; j < L; j++) {
            vec x = load(b + (size_t)j * D + e);
            for (int r = 0; r < ROWS; r++) sum[r] += p[(size_t)r * keys + j] * x;
        }
        for (int r = 0; r < ROWS; r++) store(out + r * D + e, sum[r]);
    }
}

// out (keys, D) += p (ROWS, keys) transposed @ a (ROWS, D)
static inline void add_to_keys(float *out, const float *p, const float *a, int L, int keys, int D) {
    for (int e = 0; e < D; e += W) {
        vec x[ROWS];
        for (int r = 0; r < ROWS; r++) x[r] = load(a + r * D + e);
        for (int j = 0; j < L; j++) {
            vec sum = load(out + (size_t)j * D + e);
            for (int r = 0; r < ROWS; r++) sum += p[(size_t)r * keys + j] * x[r];
            store(out + (size_t)j * D + e, sum);
        }
    }
}

static inline void attend_head(head *h, rows q, rows k, rows v, const bf16 *mask, dropout drop, float scale, int b, int a,
                               int A, int D, rows context, float *stats) {
    uint32_t first = (uint32_t)(b * A + a) * h->Q;
    stats += 3 * (size_t)first;
    read_head(h, q, k, v, mask, scale, b, a, D);
    for (int i = 0; i < h->Q; i += ROWS) {
        int count = h->Q - i < ROWS ? h->Q - i : ROWS;
        into_keys(h->p, h->q + i * D, h->k_t, h->mask, h->keys, D);
        for (int r = 0; r < count; r++) {
            float *p = h->p + (size_t)r * h->keys, top = -INFINITY;
            vec most = load(p), sum = {}, left = {};
            for (int j = W; j < h->keys; j += W) {
                vec x = load(p + j);
                ivec more = x > most;
                most = (vec)(((ivec)x & more) | ((ivec)most & ~more));
            }
            for (int e = 0; e < W; e++) top = most[e] > top ? most[e] : top;
            for (int j = 0; j < h->keys; j += W) {
                vec x = exponential(load(p + j) - top);
                sum += x;
                store(p + j, x);
            }
            float share = 1 / total(sum);
            for (int j = 0; j < h->keys; j += W) {
                vec x = apply_dropout(&drop, (first + i + r) * h->keys + j, load(p + j) * share);
                left += x;
                store(p + j, x);
            }
            float *to = stats + 3 * (i + r);
            to[0] = top, to[1] = share, to[2] = total(left);
        }
        from_keys(h->out, h->p, h->v, h->L, h->keys, D);
        scatter(of_head(context, b, a, D) + i * context.row, h->out, count, D, context.row, 1);
    }
}

static inline void attend_head_backward(head *h, rows q, rows k, rows v, const bf16 *mask, dropout drop, float scale, int b,
                                        int a, int A, int D, const float *stats, rows grad, const float *grad_sums,
                                        rows grad_q, rows grad_k, rows grad_v) {
    uint32_t first = (uint32_t)(b * A + a) * h->Q;
    stats += 3 * (size_t)first;
    int same = read_head(h, q, k, v, mask, scale, b, a, D);
    if (!same) transpose(h->v_t, h->v, h->L, h->keys, D);
    gather(h->c, of_head(grad, b, a, D), h->Q, D, grad.row, 1);
    memset(h->dk, 0, sizeof(float) * h->keys * D);
    memset(h->dv, 0, sizeof(float) * h->keys * D);
    for (int i = 0; i < h->Q; i += ROWS) {
        into_keys(h->p, h->q + i * D, h->k_t, h->mask, h->keys, D);
        into_keys(h->s, h->c + i * D, h->v_t, 0, h->keys, D);
        for (int r = 0; r < ROWS; r++) {
            float *p = h->p + (size_t)r * h->keys, *s = h->s + (size_t)r * h->keys;
            if (i + r >= h->Q) {  // padding rows add nothing
                memset(p, 0, sizeof(float) * h->keys), memset(s, 0, sizeof(float) * h->keys);
                continue;
            }
            float top = stats[3 * (i + r)], share = stats[3 * (i + r) + 1];
            float more = grad_sums ? grad_sums[first + i + r] : 0;
            uint32_t n = (first + i + r) * h->keys;
            vec sum = {};
            for (int j = 0; j < h->keys; j += W) {
                vec x = exponential(load(p + j) - top) * share, g = apply_dropout(&drop, n + j, load(s + j) + more);
                sum += x * g;
                store(p + j, x), store(s + j, g);
            }
            float mean = total(sum);
            for (int j = 0; j < h->keys; j += W) {
                vec x = load(p + j);
                store(s + j, x * (load(s + j) - mean));
                store(p + j, apply_dropout(&drop, n + j, x));
            }
        }
        from_keys(h->dq + i * D, h->s, h->k, h->L, h->keys, D);
        add_to_keys(h->dk, h->s, h->q + i * D, h->L, h->keys, D);
        add_to_keys(h->dv, h->p, h->c + i * D, h->L, h->keys, D);
    }
    scatter(of_head(grad_q, b, a, D), h->dq, h->Q, D, grad_q.row, scale);
    scatter(of_head(grad_k, b, a, D), h->dk, h->L, D, grad_k.row, 1);
    if (!same) scatter(of_head(grad_v, b, a, D), h->dv, h->L, D, grad_v.row, 1);
}

// Runs `call` for every head of every example, one thread each. A constant head size lets the compiler unroll its loops.
#define EACH_HEAD(call)                                             \
    dropout drop = make_dropout(seed, p);                           \
    int failed = 0;                                                 \
    _Pragma("omp parallel reduction(| : failed)") {                 \
        float *memory;                                              \
        head h = allocate_head(Q, L, D, &memory);                   \
        failed = !memory;                                           \
        _Pragma("omp for schedule(static)")                         \
        for (int n = 0; n < B * A; n++) {                           \
            int b = n / A, a = n % A;                               \
            if (failed) continue;                                   \
            if (D == 32) call(32);                                  \
            else if (D == 64) call(64);                             \
            else call(D);                                           \
        }                                                           \
        free(memory);                                               \
    }                                                               \
    return failed;

// Attention. q (B, Q, A, D), k and v (B, L, A, D), mask (B, L) to add to the scores, or null -> context (B, Q, A, D), and
// stats (B, A, Q, 3): the maximum score, 1 / the sum of exponentials, the sum of the weights after dropout.
// D is a multiple of 16. Returns 1 if memory runs out, else 0, as all functions here.
int attend(rows q, rows k, rows v, const bf16 *mask, double p, uint64_t seed, double scale, int B, int Q, int L, int A,
           int D, rows context, float *stats) {
#define CALL(size) attend_head(&h, q, k, v, mask, drop, scale, b, a, A, size, context, stats)
    EACH_HEAD(CALL)
#undef CALL
}

// The gradients of `attend`: grad (B, Q, A, D) of the context, grad_sums (B, A, Q) of the sums of weights, or null -> grad_q,
// grad_k, grad_v. If k is v, grad_k is the gradient of both and grad_v is not written.
int attend_backward(rows q, rows k, rows v, const bf16 *mask, double p, uint64_t seed, double scale, int B, int Q, int L,
                    int A, int D, const float *stats, rows grad, const float *grad_sums, rows grad_q, rows grad_k,
                    rows grad_v) {
#define CALL(size)                                                                                                    \
    attend_head_backward(&h, q, k, v, mask, drop, scale, b, a, A, size, stats, grad, grad_sums, grad_q, grad_k, grad_v)
    EACH_HEAD(CALL)
#undef CALL
}

// ---------------------------------------------------------------------------------------------------- LayerNorm

// sum = residual + dropout(x); out = low = LayerNorm(sum), low in bfloat16. Matrices are (T, H), mean and rstd (T).
// residual is bfloat16 if `low_residual`, else float32. sum, mean, rstd, out: null if not needed. H is a multiple of 16.
int add_norm(const void *residual, int low_residual, const bf16 *x, double p, uint64_t seed, const float *gain,
             const float *bias, double epsilon, int T, int H, float *sum, float *mean, float *rstd, float *out,
             bf16 *low) {
    dropout drop = make_dropout(seed, p);
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        float *own = sum ? 0 : malloc(sizeof(float) * H);
        failed = !sum && !own;
#pragma omp for schedule(static)
        for (int t = 0; t < T; t++) {
            if (failed) continue;
            size_t at = (size_t)t * H;
            float *row = sum ? sum + at : own;
            vec m = {}, v = {};
            for (int j = 0; j < H; j += W) {
                vec s = low_residual ? widen((const bf16 *)residual + at + j) : load((const float *)residual + at + j);
                s += apply_dropout(&drop, at + j, widen(x + at + j));
                store(row + j, s);
                m += s;
            }
            float middle = total(m) / H;
            for (int j = 0; j < H; j += W) {
                vec d = load(row + j) - middle;
                v += d * d;
            }
            float by = 1 / sqrtf(total(v) / H + (float)epsilon);
            if (mean && rstd) mean[t] = middle, rstd[t] = by;
            for (int j = 0; j < H; j += W) {
                vec y = (load(row + j) - middle) * by * load(gain + j) + load(bias + j);
                if (out) store(out + at + j, y);
                narrow(low + at + j, y);
            }
        }
        free(own);
    }
    return failed;
}

// The gradients of `add_norm`, given that of `out`, grad + more (bfloat16, or null): of the residual (float32),
// x (bfloat16), gain and bias (H).
int add_norm_backward(const float *grad, const bf16 *more, double p, uint64_t seed, const float *gain, const float *sum,
                      const float *mean, const float *rstd, int T, int H, float *grad_residual, bf16 *grad_x,
                      float *grad_gain, float *grad_bias) {
    dropout drop = make_dropout(seed, p);
    int threads = omp_get_max_threads(), used = 1;
    float *partial = calloc((size_t)threads * 2 * H, sizeof(float));
    if (!partial) return 1;
#pragma omp parallel num_threads(threads)
    {
        float *by_gain = partial + (size_t)omp_get_thread_num() * 2 * H, *by_bias = by_gain + H;
#pragma omp single
        used = omp_get_num_threads();
#pragma omp for schedule(static)
        for (int t = 0; t < T; t++) {
            size_t at = (size_t)t * H;
            float middle = mean[t], by = rstd[t];
            vec a = {}, c = {};
            for (int j = 0; j < H; j += W) {
                vec g = load(grad + at + j);
                if (more) g += widen(more + at + j);
                vec x = (load(sum + at + j) - middle) * by, d = g * load(gain + j);
                store(by_gain + j, load(by_gain + j) + g * x);
                store(by_bias + j, load(by_bias + j) + g);
                store(grad_residual + at + j, d);
                a += d;
                c += d * x;
            }
            float mean_a = total(a) / H, mean_c = total(c) / H;
            for (int j = 0; j < H; j += W) {
                vec x = (load(sum + at + j) - middle) * by;
                vec d = (load(grad_residual + at + j) - mean_a - x * mean_c) * by;
                store(grad_residual + at + j, d);
                narrow(grad_x + at + j, apply_dropout(&drop, at + j, d));
            }
        }
    }
    for (int j = 0; j < H; j++) {
        grad_gain[j] = grad_bias[j] = 0;
        for (int n = 0; n < used; n++) {
            grad_gain[j] += partial[(size_t)n * 2 * H + j];
            grad_bias[j] += partial[(size_t)n * 2 * H + H + j];
        }
    }
    free(partial);
    return 0;
}

// ---------------------------------------------------------------------------------------------------- GELU

// y = f(x) and slope = f'(x) of n bfloat16 numbers, from a table of all 2^16 inputs; slope: null if not needed.
// table: indexed by the bits of x; y in the lower half, slope in the upper. The entries in use are a few kilobytes.
int look_up(const bf16 *x, int64_t n, const uint32_t *table, bf16 *y, bf16 *slope) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; i++) {
        uint32_t both = table[x[i]];
        y[i] = both;
        if (slope) slope[i] = both >> 16;
    }
    return 0;
}
