/* Base and correction on float32 arrays with one amplitude: one pass forward, one pass backward. mixed.c has other dtypes
   and one amplitude per channel.

       c(z) = sigma * (eps * ghat(u) + lift * exp(-u^2 / 2)) + gain * base(z) + slope * z,   u = (z - mu) / sigma

   ghat is u exp(-u^2 / 2), or piecewise cubics read from a table, as in formula.py; beside a table there is no lift. Where
   z or base(z) is not finite the last two terms, the tails, are 0.
   Results do not depend on the number of threads: blocks of fixed size are summed first, then their sums in order. */

#include "native.h"

#define BLOCK 4096         /* elements that one thread takes at a time */
#define FEW_BLOCKS 64      /* so many blocks have room for their sums on the stack */
#define PART 256           /* elements whose places in the table are computed at a time */
#define MOST_INTERVALS 1024

typedef float v8 __attribute__((vector_size(32), aligned(4), may_alias));

struct terms {
    float eps, lift;      /* amplitudes; 0 of a term that is absent */
    float gain, slope;
    int which;            /* the terms */
    float mu, sigma;
    float inverse;        /* 1 / sigma */
    float clamp;          /* largest |u| */
    float per_sd;         /* intervals of the table per standard deviation */
    float half_width;     /* end of the table in standard deviations */
    int intervals;
    enum base base;
    float below;          /* slope of a KINK for z < 0 */
};

#define LOG2_E 1.44269504f
#define BELL_SCALE 0.849321800f   /* exp(-u^2 / 2) = 2^-(BELL_SCALE u)^2 */
#define THEN(coefficient) p = p * x + coefficient;

/* result = 2^x for x in [-126, 0], to about one unit in the last place; the argument is -x. 2^x = 2^round(x) p, with p a
   polynomial in the rest. Adding 12583039 = 1.5 2^23 + 127 leaves round(x) and the bias of exponents in the lowest bits of
   n, from where they are shifted into the exponent of `scale`. */
#define POWER_OF_2(minus_x, result) do { \
    float n = 12583039.0f - (minus_x), x = (12583039.0f - n) - (minus_x), p = 1.53458095e-4f; \
    THEN(1.33999312e-3f) THEN(9.61848897e-3f) THEN(5.55032878e-2f) THEN(0.240226469f) THEN(0.693147206f) THEN(1.0f) \
    int32_t bits; \
    memcpy(&bits, &n, 4); \
    bits = (int32_t)((uint32_t)bits << 23); \
    float scale; \
    memcpy(&scale, &bits, 4); \
    result = p * scale; \
} while (0)

/* a + c, and a bit for bit where c is zero; adding +0.0 would turn -0.0 into +0.0. */
static inline float plus(float a, float c) { return c == 0.0f ? a : a + c; }

/* x, or 0 for infinities and NaN. */
static inline float if_finite(float x) { return x - x == 0.0f ? x : 0.0f; }

/* 1, or 0 where x is infinite or NaN. */
static inline float is_finite(float x) { return x - x == 0.0f ? 1.0f : 0.0f; }

static inline float clamped(float u, float bound) {
    u = u > -bound ? u : -bound;   /* so is a NaN: the base passes it on, and sums over other elements stay finite */
    return u > bound ? bound : u;
}

/* exp(-u^2 / 2) from v = BELL_SCALE u. */
static inline float bell_of(float v) {
    float e;
    POWER_OF_2(v * v, e);
    return e;
}

static inline float sigmoid(float z) {
    float size = z < 0.0f ? -z : z, near = size < 87.0f ? size : 87.0f, e;
    POWER_OF_2(near * LOG2_E, e);
    e = size > 87.0f ? 0.0f : e;   /* so that infinities give the same results as in torch */
    float whole = 1.0f + e, y = 0.98989899f + e * (e * 0.32323232f - 0.80808081f);   /* 1 / whole, to 1 % */
    y = y * (2.0f - whole * y);   /* two of Newton's steps are several times as fast as a division */
    y = y * (2.0f - whole * y);
    return (z < 0.0f ? e : 1.0f) * y;
}

/* For GELU and GELU_TANH, base(z) / z and the slope base'(z). Minus 1/2 they are odd functions of z: z times a polynomial
   in x = 2 (z / end)^2 - 1, fitted with the smallest maximal error (1e-7, as small as rounding), and constant from `end`
   on. */
#define SQUARED(z, end) (z * z < end * end ? z * z : end * end) * (2.0f / (end * end)) - 1.0f

/* These two let a NaN pass. */
static inline float half_limited(float h) {
    h = h < -0.5f ? -0.5f : h;
    return h > 0.5f ? 0.5f : h;
}

static inline float limited(float z, float end) {
    z = z < -end ? -end : z;
    return z > end ? end : z;
}

static inline float gelu_cdf(float z) {
    float x = SQUARED(z, 5.4f), p = 3.92849877e-4f;
    THEN(-1.02836534e-3f) THEN(8.74963065e-4f) THEN(-1.18642091e-3f) THEN(3.65888444e-3f) THEN(-6.7153261e-3f)
    THEN(9.6512204e-3f) THEN(-1.39633268e-2f) THEN(1.96451358e-2f) THEN(-2.57464554e-2f) THEN(3.21165957e-2f)
    THEN(-3.9206814e-2f) THEN(4.84995916e-2f) THEN(-6.53280541e-2f) THEN(0.130928114f)
    return 0.5f + half_limited(z * p);
}

static inline float gelu_slope(float z) {
    float near = limited(z, 5.8f), x = SQUARED(near, 5.8f), p = -2.92551005e-3f;
    THEN(7.33477063e-3f) THEN(-2.9433514e-3f) THEN(3.65067768e-4f) THEN(-1.78518761e-2f) THEN(3.49680558e-2f)
    THEN(-3.65718119e-2f) THEN(4.37326618e-2f) THEN(-6.02969602e-2f) THEN(6.97622448e-2f) THEN(-6.9679305e-2f)
    THEN(6.5087609e-2f) THEN(-5.77154085e-2f) THEN(5.01604937e-2f) THEN(-4.61970381e-2f) THEN(4.86359559e-2f)
    THEN(-6.16574697e-2f) THEN(0.121998772f)
    return 0.5f + near * p;
}

static inline float tanh_cdf(float z) {
    float x = SQUARED(z, 5.0f), p = -4.6964467e-4f;
    THEN(6.22381922e-4f) THEN(1.28702424e-3f) THEN(-2.0580159e-3f) THEN(-4.84538032e-4f) THEN(6.20110019e-4f)
    THEN(2.78232154e-3f) THEN(-4.75483621e-3f) THEN(6.0625216e-3f) THEN(-9.88249388e-3f) THEN(1.58829428e-2f)
    THEN(-2.31187791e-2f) THEN(3.13766822e-2f) THEN(-4.05335613e-2f) THEN(5.16553521e-2f) THEN(-7.03660101e-2f)
    THEN(0.141378537f)
    return 0.5f + half_limited(z * p);
}

static inline float tanh_slope(float z) {
    float near = limited(z, 5.2f), x = SQUARED(near, 5.2f), p = -6.60280604e-3f;
    THEN(9.99521278e-3f) THEN(2.05608662e-2f) THEN(-3.37091088e-2f) THEN(-2.7455762e-2f) THEN(4.6644859e-2f)
    THEN(2.77318582e-2f) THEN(-4.91681285e-2f) THEN(4.77156515e-4f) THEN(4.24218457e-3f) THEN(2.82996483e-2f)
    THEN(-4.37025055e-2f) THEN(5.21521419e-2f) THEN(-6.76928163e-2f) THEN(8.03138912e-2f) THEN(-8.21993351e-2f)
    THEN(7.4769482e-2f) THEN(-6.46945685e-2f) THEN(6.04470037e-2f) THEN(-7.05811754e-2f) THEN(0.136325821f)
    return 0.5f + near * p;
}

/* Value and slope of a base. */
static inline __attribute__((always_inline)) float base_value(enum base base, float below, float z) {
    if (base == KINK) return z > 0.0f || z != z ? z : (below == 0.0f ? 0.0f : below * z);
    if (base == SILU) return z * sigmoid(z);
    return z * (base == GELU ? gelu_cdf(z) : tanh_cdf(z));
}

static inline __attribute__((always_inline)) float base_slope(enum base base, float below, float z) {
    if (base == KINK) return z > 0.0f || z != z ? 1.0f : below;
    if (base == SILU) {
        float s = sigmoid(z);
        return s * (1.0f + z * (1.0f - s));
    }
    return base == GELU ? gelu_slope(z) : tanh_slope(z);
}

/* Joins base and bump; gain and slope [m], or null for both if there are no tails. */
static inline __attribute__((always_inline)) void
combine_values(enum base base, float below, const float *z, const float *c, const float *gain, const float *slope,
               float *out, int m) {
    if (!gain) {
#pragma omp simd
        for (int i = 0; i < m; i++) {
            if (base == GIVEN) {
                out[i] = plus(out[i], c[i]);
            } else {
                out[i] = base_value(base, below, z[i]) + c[i];
            }
        }
        return;
    }
#pragma omp simd
    for (int i = 0; i < m; i++) {
        float b = base == GIVEN ? out[i] : base_value(base, below, z[i]);
        out[i] = plus(b, c[i] + (gain[i] * if_finite(b) + slope[i] * if_finite(z[i])));
    }
}

/* value [m]: base(z); needed with tails. */
static inline __attribute__((always_inline)) void
combine_slopes(enum base base, float below, const float *z, const float *grad, const float *c, const float *gain,
               const float *slope, const float *value, float *out, int m) {
    if (!gain) {
#pragma omp simd
        for (int i = 0; i < m; i++) {
            if (base == GIVEN) {
                out[i] = c[i] == 0.0f ? out[i] : plus(out[i], grad[i] * c[i]);   /* 0 * inf is not 0 */
            } else {
                out[i] = grad[i] * (base_slope(base, below, z[i]) + c[i]);
            }
        }
        return;
    }
#pragma omp simd
    for (int i = 0; i < m; i++) {
        float tail = c[i] + slope[i] * is_finite(z[i]), stretch = gain[i] * is_finite(value[i]);
        if (base == GIVEN) {
            float by_gain = stretch == 0.0f ? out[i] : out[i] + stretch * out[i];
            out[i] = tail == 0.0f ? by_gain : plus(by_gain, grad[i] * tail);
        } else {
            out[i] = grad[i] * ((1.0f + stretch) * base_slope(base, below, z[i]) + tail);
        }
    }
}

/* One loop for each base, so that the compiler knows the base inside the loop. */
#define FOR_EACH_BASE(base, call) \
    switch (base) { \
    case GIVEN: call(GIVEN); break; \
    case KINK: call(KINK); break; \
    case SILU: call(SILU); break; \
    case GELU: call(GELU); break; \
    default: call(GELU_TANH); \
    }

static void finish_values(enum base base, float below, const float *z, const float *c, const float *gain,
                          const float *slope, float *out, int m) {
#define CALL(which) combine_values(which, below, z, c, gain, slope, out, m)
    FOR_EACH_BASE(base, CALL)
#undef CALL
}

static void finish_slopes(enum base base, float below, const float *z, const float *grad, const float *c,
                          const float *gain, const float *slope, const float *value, float *out, int m) {
#define CALL(which) combine_slopes(which, below, z, grad, c, gain, slope, value, out, m)
    FOR_EACH_BASE(base, CALL)
#undef CALL
}

static inline __attribute__((always_inline)) void
values_of(enum base base, float below, const float *z, const float *given, float *value, int m) {
#pragma omp simd
    for (int i = 0; i < m; i++) value[i] = base == GIVEN ? given[i] : base_value(base, below, z[i]);
}

/* base(z) of m elements; given [m], or null if nobody asks for the values of a base that is GIVEN. */
static void base_values(enum base base, float below, const float *z, const float *given, float *value, int m) {
    if (base == GIVEN && !given) given = z;
#define CALL(which) values_of(which, below, z, given, value, m)
    FOR_EACH_BASE(base, CALL)
#undef CALL
}

/* Sum of weight * value over the values that are finite. */
static float finite_sum(const float *weight, const float *value, int m) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < m; i++) sum += weight[i] * if_finite(value[i]);
    return sum;
}

static void fill(float *x, float value, int m) {
    for (int i = 0; i < m; i++) x[i] = value;
}

/* Transposes a table: the coefficients a0..a3 of an interval side by side. A last row stands for the right end and
   everything beyond it. */
static void to_rows(const float *table, int intervals, float *rows) {
    for (int k = 0; k < intervals; k++)
        for (int j = 0; j < 4; j++) rows[4 * k + j] = table[j * intervals + k];
    const float *end = rows + 4 * (intervals - 1);
    float *beyond = rows + 4 * intervals;
    beyond[0] = end[0] + end[1] + end[2] + end[3];
    beyond[1] = end[1] + 2 * end[2] + 3 * end[3];
    beyond[2] = beyond[3] = 0.0f;
}

/* The same for sigma * eps * ghat instead of ghat. */
static void to_folded_rows(const float *table, const struct terms *s, float *rows) {
    to_rows(table, s->intervals, rows);
    for (int k = 0; k < 4 * (s->intervals + 1); k++) rows[k] = s->sigma * (s->eps * rows[k]);
}

/* For m elements, where the interval's row begins, and the place inside the interval in [0, 1]; filled up with 0 to a
   multiple of 8 elements. */
static inline void places(const float *z, int m, const struct terms *s, int32_t *row, float *t) {
    float mu = s->mu, inverse = s->inverse, half = s->half_width, per_sd = s->per_sd, top = (float)s->intervals;
    for (int i = 0; i < m; i++) {
        float place = ((z[i] - mu) * inverse + half) * per_sd;
        place = place > 0.0f ? place : 0.0f;   /* so is the place of a NaN, which the base passes on */
        place = place < top ? place : top;
        int32_t k = (int32_t)place;
        row[i] = 4 * k;
        t[i] = place - (float)k;
    }
    for (int i = m; i < ((m + 7) & ~7); i++) {
        row[i] = 0;
        t[i] = 0.0f;
    }
}

#define SHUFFLE __builtin_shufflevector
#define JOINED(i, j) SHUFFLE(*(const v4 *)(rows + row[i]), *(const v4 *)(rows + row[j]), 0, 1, 2, 3, 4, 5, 6, 7)

/* Coefficients a0..a3 of elements i to i + 7. Loading whole rows and transposing them is several times as fast as
   gathering the coefficients one by one. */
#define READ_8 \
    v8 a = JOINED(i, i + 4), b = JOINED(i + 1, i + 5), c = JOINED(i + 2, i + 6), d = JOINED(i + 3, i + 7); \
    v8 ab0 = SHUFFLE(a, b, 0, 8, 1, 9, 4, 12, 5, 13), ab1 = SHUFFLE(a, b, 2, 10, 3, 11, 6, 14, 7, 15); \
    v8 cd0 = SHUFFLE(c, d, 0, 8, 1, 9, 4, 12, 5, 13), cd1 = SHUFFLE(c, d, 2, 10, 3, 11, 6, 14, 7, 15); \
    v8 a0 = SHUFFLE(ab0, cd0, 0, 1, 8, 9, 4, 5, 12, 13), a1 = SHUFFLE(ab0, cd0, 2, 3, 10, 11, 6, 7, 14, 15); \
    v8 a2 = SHUFFLE(ab1, cd1, 0, 1, 8, 9, 4, 5, 12, 13), a3 = SHUFFLE(ab1, cd1, 2, 3, 10, 11, 6, 7, 14, 15);

/* Values, and slopes per interval; either may be null. */
static inline void read_rows(const float *rows, const int32_t *row, const float *t, int m, float *value, float *slope) {
    for (int i = 0; i < m; i += 8) {
        READ_8
        v8 x = *(const v8 *)(t + i);
        if (value) *(v8 *)(value + i) = ((a3 * x + a2) * x + a1) * x + a0;
        if (slope) *(v8 *)(slope + i) = (3.0f * a3 * x + 2.0f * a2) * x + a1;
    }
}

/* Slopes per interval times a factor; returns the sum of weight * value. */
static inline float read_slopes(const float *rows, const int32_t *row, const float *t, const float *weight, int m,
                                float factor, float *slope) {
    v8 sums = {0};
    for (int i = 0; i < m; i += 8) {
        READ_8
        v8 x = *(const v8 *)(t + i), w = {0};
        if (i + 8 <= m) w = *(const v8 *)(weight + i);
        else memcpy(&w, weight + i, (size_t)(m - i) * sizeof(float));
        sums += w * (((a3 * x + a2) * x + a1) * x + a0);
        *(v8 *)(slope + i) = factor * ((3.0f * a3 * x + 2.0f * a2) * x + a1);
    }
    return ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
}

/* base(z) + c(z) with the closed form, in one loop; v = BELL_SCALE u. tails: whether there are any. */
static inline __attribute__((always_inline)) void
bell_values(enum base base, int tails, const float *z, float *out, int64_t n, const struct terms *s) {
    float amplitude = s->eps * s->sigma / BELL_SCALE, lift = s->lift * s->sigma, below = s->below;
    float mu = s->mu, inverse = s->inverse * BELL_SCALE, bound = s->clamp * BELL_SCALE;
    float gain = s->gain, slope = s->slope;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        float v = clamped((z[i] - mu) * inverse, bound), c = (amplitude * v + lift) * bell_of(v);
        float b = base == GIVEN ? out[i] : base_value(base, below, z[i]);
        if (tails) c += gain * if_finite(b) + slope * if_finite(z[i]);
        out[i] = base == GIVEN ? plus(b, c) : b + c;
    }
}

/* grad (base' + c')(z) with the closed form. given [n]: base(z), if the base is GIVEN and there is a gain. sums [4]: of
   grad u e, grad e, grad base(z) and grad z, with e = exp(-u^2 / 2); the first two times sigma, they are the gradients by
   the amplitudes. */
static inline __attribute__((always_inline)) void
bell_slopes(enum base base, int tails, const float *z, const float *grad, const float *given, float *out, int64_t n,
            const struct terms *s, double *sums) {
    float eps = s->eps, by_square = s->eps / (BELL_SCALE * BELL_SCALE), by_v = s->lift / BELL_SCALE, below = s->below;
    float mu = s->mu, inverse = s->inverse * BELL_SCALE, bound = s->clamp * BELL_SCALE;
    float by_eps = 0.0f, by_lift = 0.0f, by_gain = 0.0f, by_slope = 0.0f, gain = s->gain, slope = s->slope;
    int nothing = eps == 0.0f && s->lift == 0.0f && gain == 0.0f && slope == 0.0f;
#pragma omp simd reduction(+ : by_eps, by_lift, by_gain, by_slope)
    for (int64_t i = 0; i < n; i++) {
        float v = clamped((z[i] - mu) * inverse, bound), e = bell_of(v), pull = grad[i] * e, stretch = 0.0f;
        float c = (eps - v * (by_square * v + by_v)) * e;   /* (eps (1 - u^2) - lift u) e */
        by_eps += pull * v;
        by_lift += pull;
        if (tails) {
            float b = base == GIVEN ? given[i] : base_value(base, below, z[i]);
            by_gain += grad[i] * if_finite(b);
            by_slope += grad[i] * if_finite(z[i]);
            stretch = gain * is_finite(b);
            c += slope * is_finite(z[i]);
        }
        if (base == GIVEN) {
            float g = out[i];
            if (tails) g = stretch == 0.0f ? g : g + stretch * g;
            out[i] = nothing ? out[i] : plus(g, grad[i] * c);   /* 0 * inf is not 0 */
        } else if (tails) {
            out[i] = grad[i] * ((1.0f + stretch) * base_slope(base, below, z[i]) + c);
        } else {
            out[i] = grad[i] * (base_slope(base, below, z[i]) + c);
        }
    }
    sums[0] = by_eps / BELL_SCALE;
    sums[1] = by_lift;
    sums[2] = by_gain;
    sums[3] = by_slope;
}

/* One block, by one thread. rows: of sigma * eps * ghat, or null for the closed form. */
static void forward(const float *z, float *out, int64_t n, struct terms s, const float *rows) {
    int32_t row[PART];
    float t[PART], value[PART], gain[PART], slope[PART];
    int tails = s.which & TAILS;
    if (!rows && s.which & BUMP) {
        if (tails) {
#define CALL(which) bell_values(which, 1, z, out, n, &s)
            FOR_EACH_BASE(s.base, CALL)
#undef CALL
        } else {
#define CALL(which) bell_values(which, 0, z, out, n, &s)
            FOR_EACH_BASE(s.base, CALL)
#undef CALL
        }
        return;
    }
    if (tails) {
        fill(gain, s.gain, PART);
        fill(slope, s.slope, PART);
    }
    if (!(s.which & BUMP)) fill(value, 0.0f, PART);
    for (int64_t start = 0; start < n; start += PART) {
        int m = n - start < PART ? (int)(n - start) : PART;
        if (s.which & BUMP) {
            places(z + start, m, &s, row, t);
            read_rows(rows, row, t, m, value, 0);
        }
        finish_values(s.base, s.below, z + start, value, tails ? gain : 0, slope, out + start, m);
    }
}

/* One block, by one thread. rows: of ghat, or null for the closed form; given and sums: as of bell_slopes. */
static void backward(const float *z, const float *grad, const float *given, float *out, int64_t n, struct terms s,
                     const float *rows, double *sums) {
    int32_t row[PART];
    float t[PART], bend[PART], value[PART], gain[PART], slope[PART];
    int tails = s.which & TAILS;
    int acts = s.eps != 0.0f || s.gain != 0.0f || s.slope != 0.0f || s.base != GIVEN;   /* 0 * inf is not 0 */
    sums[0] = sums[1] = sums[2] = sums[3] = 0.0;
    if (!rows && s.which & BUMP) {
        if (tails) {
            const float *values = given ? given : z;   /* without a gain nobody asks for them */
#define CALL(which) bell_slopes(which, 1, z, grad, values, out, n, &s, sums)
            FOR_EACH_BASE(s.base, CALL)
#undef CALL
        } else {
#define CALL(which) bell_slopes(which, 0, z, grad, 0, out, n, &s, sums)
            FOR_EACH_BASE(s.base, CALL)
#undef CALL
        }
        return;
    }
    if (tails) {
        fill(gain, s.gain, PART);
        fill(slope, s.slope, PART);
    }
    if (!(s.which & BUMP)) fill(bend, 0.0f, PART);
    for (int64_t start = 0; start < n; start += PART) {
        int m = n - start < PART ? (int)(n - start) : PART;
        if (s.which & BUMP) {
            places(z + start, m, &s, row, t);
            sums[0] += read_slopes(rows, row, t, grad + start, m, s.eps * s.per_sd, bend);
        }
        if (tails) {
            base_values(s.base, s.below, z + start, given ? given + start : 0, value, m);
            sums[2] += finite_sum(grad + start, value, m);
            sums[3] += finite_sum(grad + start, z + start, m);
        }
        if (acts)
            finish_slopes(s.base, s.below, z + start, grad + start, bend, tails ? gain : 0, slope, value, out + start, m);
    }
}

/* How many terms of `which` come before one of them. */
static int row_of(int which, int term) {
    int before = 0;
    for (int each = EPS; each < term; each *= 2) before += (which & each) != 0;
    return before;
}

/* Amplitudes of one term, `count` of them; null if it is absent. */
static const float *amplitudes_of(const float *amplitudes, int which, int term, int64_t count) {
    return which & term ? amplitudes + count * row_of(which, term) : 0;
}

static float first_of(const float *amplitudes, int which, int term, int64_t count) {
    const float *found = amplitudes_of(amplitudes, which, term, count);
    return found ? *found : 0.0f;
}

static struct terms read_terms(const float *amplitudes, int which, int64_t count, const float *shape, int intervals,
                               float half_width, float clamp, int base, float below) {
    float per_sd = intervals ? (float)intervals / (2.0f * half_width) : 1.0f;
    struct terms s = {
        .eps = first_of(amplitudes, which, EPS, count),
        .lift = first_of(amplitudes, which, LIFT, count),
        .gain = first_of(amplitudes, which, GAIN, count),
        .slope = first_of(amplitudes, which, SLOPE, count),
        .which = which,
        .mu = shape[0],
        .sigma = shape[1],
        .inverse = 1.0f / shape[1],
        .clamp = clamp,
        .per_sd = per_sd,
        .half_width = half_width,
        .intervals = intervals,
        .base = (enum base)base,
        .below = below,
    };
    return s;
}

void eafo_forward(const float *z, float *out, float *kept, int64_t n, const float *amplitudes, int which,
                  const float *shape, const float *table, int intervals, float half_width, float clamp, int base,
                  float below, int threads) {
    float rows[4 * (MOST_INTERVALS + 1)];
    struct terms s = read_terms(amplitudes, which, 1, shape, intervals, half_width, clamp, base, below);
    int nothing = s.eps == 0.0f && s.lift == 0.0f && s.gain == 0.0f && s.slope == 0.0f;
    if (nothing && base == GIVEN) return;   /* every bit of the base stays */
    if (table) to_folded_rows(table, &s, rows);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t start = 0; start < n; start += BLOCK) {
        int64_t m = n - start < BLOCK ? n - start : BLOCK;
        const float *from = kept ? memcpy(kept + start, z + start, (size_t)m * sizeof(float)) : z + start;
        forward(from, out + start, m, s, table ? rows : 0);
    }
}

/* out = grad (base' + c')(z) for n elements; if the base is GIVEN, out holds grad base'(z) before. given [n]: base(z), if
   the base is GIVEN and there is a gain, else null. by_amplitudes [terms] = sums of grad times the terms' directions.

   partial [4 per block of BLOCK elements]: for intermediate sums; null if there are at most FEW_BLOCKS blocks. */
void eafo_backward(const float *z, const float *grad, const float *given, float *out, int64_t n,
                   const float *amplitudes, int which, const float *shape, const float *table, int intervals,
                   float half_width, float clamp, int base, float below, int threads, double *partial,
                   float *by_amplitudes) {
    float rows[4 * (MOST_INTERVALS + 1)];
    struct terms s = read_terms(amplitudes, which, 1, shape, intervals, half_width, clamp, base, below);
    double total[4] = {0}, few[4 * FEW_BLOCKS], *sums = partial ? partial : few;
    if (table) to_rows(table, intervals, rows);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t start = 0; start < n; start += BLOCK) {
        int64_t m = n - start < BLOCK ? n - start : BLOCK;
        backward(z + start, grad + start, given ? given + start : 0, out + start, m, s, table ? rows : 0,
                 sums + 4 * (start / BLOCK));
    }
    for (int64_t b = 0; b < (n + BLOCK - 1) / BLOCK; b++)
        for (int k = 0; k < 4; k++) total[k] += sums[4 * b + k];
    for (int k = 0, term = EPS; k < 4; k++, term *= 2)
        if (which & term) *by_amplitudes++ = (float)(term & BUMP ? total[k] * s.sigma : total[k]);
}
