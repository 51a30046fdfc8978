/* Base and correction on arrays of float32, bfloat16 or float16, with one amplitude or one per channel. One part at a
   time is converted to float32, computed with the functions of native.c, and converted back. */

#include "native.c"

enum type { FLOAT, BFLOAT, HALF };

static inline float as_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline uint32_t as_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }

static inline float from_bfloat(uint16_t b) { return as_float((uint32_t)b << 16); }

/* Conversions round to the nearest number, ties to even. */
static inline uint16_t to_bfloat(float x) {
    uint32_t bits = as_bits(x), nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (uint16_t)(x != x ? bits >> 16 | 0x40 : nearest);
}

/* Compilers vectorise this, but not their own float16, which older ones do not have. */
static inline float from_half(uint16_t h) {
    float size = as_float((uint32_t)(h & 0x7fff) << 13) * 0x1p112f;   /* the bias of exponents is 15 instead of 127 */
    uint32_t whole = (h & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;         /* infinities and NaN */
    return as_float(as_bits(size) | whole | (uint32_t)(h & 0x8000) << 16);
}

static inline uint16_t to_half(float x) {
    uint32_t size = as_bits(x) & 0x7fffffff, sign = as_bits(x) >> 16 & 0x8000;
    uint32_t normal = (size + 0xc8000fff + (size >> 13 & 1)) >> 13;
    uint32_t tiny = as_bits(as_float(size) + 0.5f) - 0x3f000000;   /* the sum is rounded to a multiple of float16's smallest number */
    uint32_t result = size < 0x38800000 ? tiny : normal;
    result = size >= 0x477ff000 ? 0x7c00 : result;
    return (uint16_t)((size > 0x7f800000 ? 0x7e00 : result) | sign);
}

/* m elements from `at` on as float32: the array itself if it is float32, else converted into `room`. */
static float *load(enum type type, const void *from, int64_t at, float *room, int m) {
    const uint16_t *half_words = (const uint16_t *)from + at;
    if (type == FLOAT) return (float *)from + at;
    if (type == HALF) {
        for (int i = 0; i < m; i++) room[i] = from_half(half_words[i]);
    } else {
        for (int i = 0; i < m; i++) room[i] = from_bfloat(half_words[i]);
    }
    return room;
}

/* The same for elements that are going to be overwritten, whose values matter only if the base is GIVEN. */
static float *load_given(enum type type, enum base base, void *out, int64_t at, float *room, int m) {
    return base == GIVEN || type == FLOAT ? load(type, out, at, room, m) : room;
}

/* Converts m elements back. */
static void store(enum type type, const float *from, void *to, int64_t at, int m) {
    uint16_t *half_words = (uint16_t *)to + at;
    if (type == FLOAT) return;   /* computed in place */
    if (type == HALF) {
        for (int i = 0; i < m; i++) half_words[i] = to_half(from[i]);
    } else {
        for (int i = 0; i < m; i++) half_words[i] = to_bfloat(from[i]);
    }
}

/* The order of channels in memory: `inner` elements of one, then `inner` elements of the next. */
struct channels { int64_t count, inner; };

/* How many elements from `at` on, at most `most`, are of one channel, or, if inner is 1, of consecutive channels; and the
   channel of the first. */
static inline int run(const struct channels *c, int64_t at, int most, int64_t *channel) {
    int64_t length = c->inner == 1 ? c->count - at % c->count : c->inner - at % c->inner;
    *channel = at / c->inner % c->count;
    return length < most ? (int)length : most;
}

/* Amplitudes of m elements from `at` on, from those of the channels. */
static void spread(const struct channels *c, const float *amplitudes, int64_t at, int m, float *each) {
    int64_t first, step = c->inner == 1;
    for (int i = 0, k; i < m; i += k) {
        k = run(c, at + i, m - i, &first);
        for (int j = 0; j < k; j++) each[i + j] = amplitudes[first + step * j];
    }
}

/* The same for a term that may be absent. */
static const float *spread_term(const struct channels *c, const float *amplitudes, int which, int term, int64_t at, int m,
                                float *each) {
    const float *of_term = amplitudes_of(amplitudes, which, term, c->count);
    if (of_term) spread(c, of_term, at, m, each);
    else fill(each, 0.0f, m);
    return each;
}

static float weighted_sum(const float *a, const float *b, int m) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < m; i++) sum += a[i] * b[i];
    return sum;
}

/* Adds grad * value to the sums of the channels. */
static void add_up(const struct channels *c, int64_t at, int m, const float *grad, const float *value, double *sums) {
    int64_t first;
    for (int i = 0, k; i < m; i += k) {
        k = run(c, at + i, m - i, &first);
        if (c->inner == 1) {
            for (int j = 0; j < k; j++) sums[first + j] += (double)(grad[i + j] * value[i + j]);
        } else {
            sums[first] += (double)weighted_sum(grad + i, value + i, k);
        }
    }
}

/* ghat and its slope (per interval, if it is read from a table) for m elements, and, for the closed form, value and slope
   of the bell exp(-u^2 / 2). slope may be null. */
static void shapes(const float *z, int m, const struct terms *s, const float *rows, float *value, float *slope,
                   float *bell, float *bell_slope) {
    int32_t row[PART];
    float t[PART];
    if (!(s->which & BUMP)) {
        fill(value, 0.0f, m);
        fill(bell, 0.0f, m);
        if (slope) fill(slope, 0.0f, m);
        if (slope) fill(bell_slope, 0.0f, m);
        return;
    }
    if (!rows) {
#pragma omp simd
        for (int i = 0; i < m; i++) {
            float u = clamped((z[i] - s->mu) * s->inverse, s->clamp), e = bell_of(BELL_SCALE * u);
            value[i] = u * e;
            bell[i] = e;
            if (slope) {
                slope[i] = (1.0f - u * u) * e;
                bell_slope[i] = -u * e;
            }
        }
        return;
    }
    places(z, m, s, row, t);
    read_rows(rows, row, t, m, value, slope);
}

/* As eafo_forward. type: of z and out; count and inner: see struct channels; amplitudes [terms, count]. */
void eafo_mixed_forward(const void *z, void *out, int64_t n, int type, int64_t count, int64_t inner,
                        const float *amplitudes, int which, const float *shape, const float *table, int intervals,
                        float half_width, float clamp, int base, float below, int threads) {
    float rows[4 * (MOST_INTERVALS + 1)];
    struct terms s = read_terms(amplitudes, which, count, shape, intervals, half_width, clamp, base, below);
    struct channels c = {count, inner};
    int single = count == 1;
    if (table && single) to_folded_rows(table, &s, rows);
    if (table && !single) to_rows(table, intervals, rows);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t at = 0; at < n; at += PART) {
        float room[2][PART], e[PART], l[PART], gain[PART], slope[PART], value[PART], bell[PART];
        int m = n - at < PART ? (int)(n - at) : PART;
        const float *x = load((enum type)type, z, at, room[0], m);
        float *y = load_given((enum type)type, s.base, out, at, room[1], m);
        if (single) {
            forward(x, y, m, s, table ? rows : 0);
            store((enum type)type, y, out, at, m);
            continue;
        }
        spread_term(&c, amplitudes, which, EPS, at, m, e);
        if (which & LIFT) spread_term(&c, amplitudes, which, LIFT, at, m, l);
        if (which & TAILS) spread_term(&c, amplitudes, which, GAIN, at, m, gain);
        if (which & TAILS) spread_term(&c, amplitudes, which, SLOPE, at, m, slope);
        shapes(x, m, &s, table ? rows : 0, value, 0, bell, 0);
        for (int i = 0; i < m; i++) {   /* without a lift nothing is added: -0 + 0 is not -0 */
            float c = e[i] * value[i];
            value[i] = s.sigma * (which & LIFT ? c + l[i] * bell[i] : c);
        }
        finish_values(s.base, s.below, x, value, which & TAILS ? gain : 0, slope, y, m);
        store((enum type)type, y, out, at, m);
    }
}

/* As eafo_backward. type: of z, grad, given and out; count and inner: see struct channels; amplitudes and by_amplitudes
   [terms, count].

   partial [pieces, 4, count]: zeros, for intermediate sums. Each thread takes whole pieces, and their sums are added up
   in order. */
void eafo_mixed_backward(const void *z, const void *grad, const void *given, void *out, int64_t n, int type,
                         int64_t count, int64_t inner, const float *amplitudes, int which, const float *shape,
                         const float *table, int intervals, float half_width, float clamp, int base, float below,
                         int threads, int pieces, double *partial, float *by_amplitudes) {
    float rows[4 * (MOST_INTERVALS + 1)];
    struct terms s = read_terms(amplitudes, which, count, shape, intervals, half_width, clamp, base, below);
    struct channels c = {count, inner};
    int64_t parts = (n + PART - 1) / PART;
    if (table) to_rows(table, intervals, rows);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int piece = 0; piece < pieces; piece++) {
        int64_t end = PART * (parts * (piece + 1) / pieces);
        double *sums = partial + 4 * count * piece;
        for (int64_t at = PART * (parts * piece / pieces); at < n && at < end; at += PART) {
            float room[4][PART], e[PART], l[PART], gain[PART], slope[PART];
            float value[PART], bend[PART], bell[PART], bell_slope[PART];
            int m = n - at < PART ? (int)(n - at) : PART;
            const float *x = load((enum type)type, z, at, room[0], m), *g = load((enum type)type, grad, at, room[1], m);
            const float *b = given ? load((enum type)type, given, at, room[3], m) : 0;
            float *y = load_given((enum type)type, s.base, out, at, room[2], m);
            if (count == 1) {
                double of_part[4];
                backward(x, g, b, y, m, s, table ? rows : 0, of_part);
                for (int k = 0; k < 4; k++) sums[k] += of_part[k];
                store((enum type)type, y, out, at, m);
                continue;
            }
            spread_term(&c, amplitudes, which, EPS, at, m, e);
            shapes(x, m, &s, table ? rows : 0, value, bend, bell, bell_slope);
            if (which & EPS) add_up(&c, at, m, g, value, sums);
            if (which & LIFT) {
                spread_term(&c, amplitudes, which, LIFT, at, m, l);
                add_up(&c, at, m, g, bell, sums + count);
            }
            for (int i = 0; i < m; i++)
                bend[i] = s.per_sd * (e[i] * bend[i] + (which & LIFT ? l[i] * bell_slope[i] : 0.0f));
            if (which & TAILS) {
                spread_term(&c, amplitudes, which, GAIN, at, m, gain);
                spread_term(&c, amplitudes, which, SLOPE, at, m, slope);
                base_values(s.base, s.below, x, b, value, m);
                for (int i = 0; i < m; i++) bell[i] = if_finite(value[i]);
                add_up(&c, at, m, g, bell, sums + 2 * count);
                for (int i = 0; i < m; i++) bell[i] = if_finite(x[i]);
                add_up(&c, at, m, g, bell, sums + 3 * count);
            }
            finish_slopes(s.base, s.below, x, g, bend, which & TAILS ? gain : 0, slope, value, y, m);
            store((enum type)type, y, out, at, m);
        }
    }
    for (int term = EPS, k = 0; k < 4; k++, term *= 2) {
        if (!(which & term)) continue;
        for (int64_t channel = 0; channel < count; channel++) {
            double sum = 0.0;
            for (int piece = 0; piece < pieces; piece++) sum += partial[(4 * piece + k) * count + channel];
            *by_amplitudes++ = (float)(term & BUMP ? sum * s.sigma : sum);
        }
    }
}
