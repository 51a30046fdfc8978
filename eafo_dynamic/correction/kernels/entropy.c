/* Entropies of the outputs of all sites; each thread works on one site at a time. entropy/smoothed.py has the same
   estimators in torch's operations.

   Samples are float32, shape [sites, n]. A sample that is not finite is missing. Results do not depend on the number of
   threads, nor on the address of an array: every sum consists of LANES partial sums of fixed elements. */

#include <math.h>
#include <stdlib.h>

#include "native.h"

#define LANES 16
#define PER_BANDWIDTH 4      /* grid steps per bandwidth r, as in smoothed.py */
#define REACH 32             /* grid steps after which a Gaussian is cut off; its variance is 15.75 squared steps */
#define MARGIN 32            /* grid steps without samples beyond the outermost ones, as in smoothed.py */
#define NEGLIGIBLE 1e-13     /* as in smoothed.py */
#define COPIES 4             /* samples are added to so many grids in turn: equal ones need not wait for each other */
#define GRIDS 4              /* mass, density, log density, and one for convolutions */
#define FOUND 7              /* count, low, span, mean, std, entropy, fisher */
#define ROUND_PARALLEL _Pragma("omp parallel for schedule(static) num_threads(threads) if (threads > 1)")

typedef double d8 __attribute__((vector_size(64), aligned(8), may_alias));

/* log x for a normal number x > 0: x = 2^power m, log m by a series in s = (m - 1) / (m + 1). */
static inline double logarithm(double x) {
    int64_t bits;
    memcpy(&bits, &x, 8);
    int64_t power = (bits - 0x3fe6a09e667f3bcdLL) >> 52;
    bits -= power * (1LL << 52);
    double m;
    memcpy(&m, &bits, 8);   /* between sqrt(1/2) and sqrt(2) */
    double s = (m - 1.0) / (m + 1.0), q = s * s, p = 2.0 / 19.0;
    p = p * q + 2.0 / 17.0;
    p = p * q + 2.0 / 15.0;
    p = p * q + 2.0 / 13.0;
    p = p * q + 2.0 / 11.0;
    p = p * q + 2.0 / 9.0;
    p = p * q + 2.0 / 7.0;
    p = p * q + 2.0 / 5.0;
    p = p * q + 2.0 / 3.0;
    p = p * q + 2.0;
    return (double)power * 0.693147180559945309 + s * p;
}

static inline double added(const double *part) {
    double sum = 0.0;
    for (int k = 0; k < LANES; k++) sum += part[k];
    return sum;
}

/* for (i = 0; i < n; i++) in groups of LANES, with k the place in the group; the last group may be smaller. Without the
   pragma, gcc 12.2 -O3 -march=native computes conditional sums that depend on the contents of memory nearby (not
   without its loop vectoriser; address and undefined behaviour sanitizers find nothing). The asm keeps it from
   vectorising the last group, which saves a fifth of the compile time. */
#define IN_LANES(...) \
    { \
        int64_t base_ = 0; \
        for (; base_ + LANES <= n; base_ += LANES) { \
            _Pragma("omp simd") \
            for (int k = 0; k < LANES; k++) { int64_t i = base_ + k; __VA_ARGS__; } \
        } \
        for (int k = 0; base_ + k < n; k++) { int64_t i = base_ + k; __asm__ volatile(""); __VA_ARGS__; } \
    }

/* Smallest and largest of the samples that are not missing and have a weight; returns whether any is missing. weight [n],
   or null for 1 each. */
static __attribute__((noinline)) int range_of(const float *x, const float *weight, int64_t n, float *low, float *high) {
    float least[LANES], most[LANES], poison[LANES];
    for (int k = 0; k < LANES; k++) {
        least[k] = INFINITY;
        most[k] = -INFINITY;
        poison[k] = 0.0f;
    }
    IN_LANES(least[k] = x[i] < least[k] ? x[i] : least[k]; most[k] = x[i] > most[k] ? x[i] : most[k];
             poison[k] += x[i] * 0.0f)
    float all = 0.0f;
    for (int k = 0; k < LANES; k++) all += poison[k];
    int missing = all != 0.0f;   /* then it is NaN */
    if (missing || weight) {   /* rare: not worth vectorising */
        for (int k = 0; k < LANES; k++) {
            least[k] = INFINITY;
            most[k] = -INFINITY;
        }
        for (int64_t i = 0; i < n; i++) {
            __asm__ volatile("");
            if (!isfinite(x[i]) || (weight && !(weight[i] > 0.0f))) continue;
            least[0] = x[i] < least[0] ? x[i] : least[0];
            most[0] = x[i] > most[0] ? x[i] : most[0];
        }
    }
    *low = INFINITY;
    *high = -INFINITY;
    for (int k = 0; k < LANES; k++) {
        *low = least[k] < *low ? least[k] : *low;
        *high = most[k] > *high ? most[k] : *high;
    }
    return missing;
}

/* Memory of one thread. */
struct room {
    float *unit;       /* [n] samples mapped onto [0, 1], later their distance from the nearest node in grid steps */
    float *weight;     /* [n] */
    int32_t *index;    /* [n] the nearest node */
    double *grids;
    int64_t nodes;     /* number of nodes that the grids have room for */
};

/* Memory for GRIDS grids of doubles, with REACH + 1 nodes beyond both ends, then COPIES vectors of four floats per node;
   null if there is none. */
static double *grids_of(struct room *room, int64_t nodes) {
    if (nodes > room->nodes) {
        free(room->grids);
        int64_t wide = nodes + 2 * (REACH + 1);
        room->grids = malloc((size_t)wide * (GRIDS * sizeof(double) + COPIES * sizeof(v4)));
        room->nodes = room->grids ? nodes : 0;
    }
    return room->grids;
}

/* Maps samples onto [0, 1], missing ones to 0, and writes count, low, span, mean and std to found; see
   grids.Standardised. If *weighted becomes true, room->weight has the weights. Returns whether float32 can handle the
   range. */
static int standardise(const float *x, const float *weight, int64_t n, struct room *room, double *found,
                       int *weighted) {
    float low, high;
    *weighted = range_of(x, weight, n, &low, &high) || weight;
    if (!(low <= high)) low = high = 0.0f;
    double span = (double)high - low, count[LANES] = {0}, sum[LANES] = {0}, square[LANES] = {0};
    if (span > 1e30 || (span > 0.0 && span < 1e-30)) return 0;
    float inverse = span > 0.0 ? (float)(1.0 / span) : 0.0f, *unit = room->unit, *w = room->weight;
    if (*weighted) {
        IN_LANES(w[i] = isfinite(x[i]) ? (weight ? weight[i] : 1.0f) : 0.0f;
                 w[i] = w[i] > 0.0f ? w[i] : 0.0f;
                 unit[i] = w[i] > 0.0f ? (x[i] - low) * inverse : 0.0f;
                 count[k] += w[i]; sum[k] += (double)w[i] * unit[i])
        double total = added(count), mean = added(sum) / total;
        IN_LANES(double off = unit[i] - mean; square[k] += w[i] * off * off)
        found[0] = total;
        found[3] = low + span * mean;
        found[4] = span * sqrt(added(square) / total);
    } else {
        IN_LANES(unit[i] = (x[i] - low) * inverse; sum[k] += unit[i])
        double mean = added(sum) / n;
        IN_LANES(double off = unit[i] - mean; square[k] += off * off)
        found[0] = n;
        found[3] = low + span * mean;
        found[4] = span * sqrt(added(square) / n);
    }
    found[1] = low;
    found[2] = span;
    return 1;
}

/* Distributes the samples over the nodes by quadratic splines; see grids.Splines.deposit. sums [nodes, COPIES]: scratch. */
static void deposit(struct room *room, int64_t n, int weighted, float scale, int64_t nodes, double *mass, v4 *sums) {
    float *unit = room->unit;
    int32_t *index = room->index;
    memset(sums, 0, sizeof(v4) * COPIES * (size_t)nodes);
    for (int64_t i = 0; i < n; i++) {
        float position = unit[i] * scale + (float)MARGIN, nearest = (position + 12582912.0f) - 12582912.0f;
        index[i] = (int32_t)nearest;
        unit[i] = position - nearest;
    }
    for (int64_t i = 0; i < n; i++) {
        float w = weighted ? room->weight[i] : 1.0f, o = unit[i];
        v4 powers = {1.0f, o, o * o, 0.0f};
        sums[COPIES * index[i] + (i & (COPIES - 1))] += w * powers;
    }
    for (int64_t j = -1; j <= nodes; j++) mass[j] = 0.0;
    for (int64_t j = 0; j < nodes; j++) {
        const v4 *of = sums + COPIES * j;
        v4 m = (of[0] + of[1]) + (of[2] + of[3]);
        double even = 0.125 * m[0] + 0.5 * m[2], odd = 0.5 * m[1];
        mass[j - 1] += even - odd;
        mass[j] += 0.75 * m[0] - m[2];
        mass[j + 1] += even + odd;
    }
}

/* out = grid convolved with a symmetric kernel, or, if odd, with an antisymmetric one. taps: the kernel from its centre
   outwards; nodes: a multiple of LANES. */
static inline __attribute__((always_inline)) void
convolve(const double *restrict grid, const double *restrict taps, int odd, int64_t nodes, double *restrict out) {
    for (int64_t start = 0; start < nodes; start += 2 * 8) {
        const double *at = grid + start;
        d8 low = taps[0] * *(const d8 *)at, high = taps[0] * *(const d8 *)(at + 8);
        for (int k = 1; k <= REACH; k++) {
            d8 before = *(const d8 *)(at - k), after = *(const d8 *)(at + k);
            d8 next = *(const d8 *)(at + 8 - k), last = *(const d8 *)(at + 8 + k);
            low += taps[k] * (odd ? before - after : before + after);
            high += taps[k] * (odd ? next - last : next + last);
        }
        *(d8 *)(out + start) = low;
        *(d8 *)(out + start + 8) = high;
    }
}

/* A Gaussian of this variance (in squared grid steps), and its derivative. */
static void make_taps(double variance, double *even, double *odd) {
    for (int k = 0; k <= REACH; k++) {
        even[k] = exp(-0.5 * k * k / variance) / sqrt(6.283185307179586 * variance);
        odd[k] = -k / variance * even[k];
    }
}

/* Gaussian kernels on the grid: that of the density, its derivative, and its square. */
struct kernels {
    double density[REACH + 1], slope[REACH + 1], square[REACH + 1], unused[REACH + 1];
    double step, resolution;
};

/* Entropy and Fisher information from the mass on the nodes, grids[0]; leaves the log density in grids[2]. */
static void read_entropy(double **grids, int64_t nodes, const struct kernels *of, int sampled, int fisher,
                         double *found) {
    double *mass = grids[0], *q = grids[1], *log_q = grids[2], *square = grids[3], total = found[0];
    double entropy[LANES] = {0}, bias[LANES] = {0}, information[LANES] = {0}, step = of->step;
    int64_t n = nodes;
    convolve(mass, of->density, 0, nodes, q);
    IN_LANES(q[i] = q[i] / step; q[i] = q[i] > NEGLIGIBLE ? q[i] : NEGLIGIBLE; log_q[i] = logarithm(q[i]);
             entropy[k] -= q[i] > 10 * NEGLIGIBLE ? q[i] * log_q[i] : 0.0)
    found[5] = added(entropy) * step;
    if (sampled) {   /* the square of a Gaussian kernel is one of half the variance, times 1 / (2 r sqrt(pi)) */
        convolve(mass, of->square, 0, nodes, square);
        IN_LANES(bias[k] += q[i] > 10 * NEGLIGIBLE ? square[i] / q[i] : 0.0)
        found[5] += (added(bias) / (2.0 * of->resolution * 1.7724538509055160) - 1.0) / (2.0 * total);
    }
    if (fisher) {
        convolve(mass, of->slope, 1, nodes, square);
        IN_LANES(information[k] += q[i] > 10 * NEGLIGIBLE ? square[i] * square[i] / q[i] : 0.0)
        found[6] = added(information) / (step * step * step);
    }
}

/* sbar_r at every sample, per standard deviation; see smoothed.SmoothedOutput._score. parts [nodes]: scratch. */
static void read_score(double **grids, v4 *parts, int64_t nodes, const struct kernels *of, struct room *room,
                       int weighted, int64_t n, float *score) {
    double *log_q = grids[2], *slope = grids[3];
    for (int k = 1; k <= REACH; k++) {
        log_q[-k] = log_q[0];
        log_q[nodes - 1 + k] = log_q[nodes - 1];
    }
    convolve(log_q, of->slope, 1, nodes, slope);
    slope[-1] = slope[nodes] = 0.0;
    for (int64_t j = 0; j < nodes; j++) {
        double left = slope[j - 1] / of->step, middle = slope[j] / of->step, right = slope[j + 1] / of->step;
        parts[j] = (v4){(float)(0.125 * (left + 6.0 * middle + right)), (float)(0.5 * (right - left)),
                        (float)(0.5 * (left - 2.0 * middle + right)), 0.0f};
    }
    for (int64_t i = 0; i < n; i++) {
        float o = room->unit[i];
        v4 part = parts[room->index[i]];
        score[i] = part[0] + o * (part[1] + o * part[2]);
    }
    if (weighted)
        for (int64_t i = 0; i < n; i++) score[i] = room->weight[i] > 0.0f ? score[i] : 0.0f;
}

/* One site; score may be null. Returns whether its numbers could be handled. */
static int smooth_site(const float *x, const float *weight, int64_t n, const struct kernels *of, int sampled,
                       struct room *room, double *found, float *score) {
    int weighted;
    if (!standardise(x, weight, n, room, found, &weighted)) return 0;
    double spread = found[4], r = of->resolution, *grids[GRIDS];
    if (!(found[0] > 0.0) || !(spread > 0.0)) {   /* no sample, or a constant */
        found[5] = found[0] > 0.0 ? 0.5 * log(17.079468445347132 * r * r) : NAN;
        found[6] = found[0] > 0.0 ? 1.0 / (r * r) : NAN;
        if (score) memset(score, 0, sizeof(float) * (size_t)n);
        return 1;
    }
    double scale = found[2] / (spread * of->step);
    if (scale > 1e6) return 0;
    int64_t nodes = ((int64_t)scale + 2 * MARGIN + 2) / LANES * LANES + LANES, wide = nodes + 2 * (REACH + 1);
    double *all = grids_of(room, nodes);
    if (!all) return 0;
    for (int g = 0; g < GRIDS; g++) grids[g] = all + g * wide + REACH + 1;
    memset(all, 0, sizeof(double) * (size_t)wide);
    v4 *quads = (v4 *)(all + GRIDS * wide);
    deposit(room, n, weighted, (float)scale, nodes, grids[0], quads);
    for (int64_t j = -1; j <= nodes; j++) grids[0][j] /= found[0];
    read_entropy(grids, nodes, of, sampled, score != 0, found);
    if (score) read_score(grids, quads, nodes, of, room, weighted, n, score);
    return 1;
}

/* Moments and entropy of every site. found [sites, 7] = count, low, span, mean, std, resolution-r entropy, and, with a
   score, Fisher information; score [sites, n] per standard deviation, or null.
   x [sites, n], weight [sites, n] or null; sampled: whether to subtract the bias of a random sample from the entropy.
   Returns the number of sites whose numbers could not be handled. */
int eafo_smooth(const float *x, const float *weight, int64_t sites, int64_t n, double resolution, int sampled,
                int threads, double *found, float *score) {
    struct kernels of = {.step = resolution / PER_BANDWIDTH, .resolution = resolution};
    int refused = 0;
    make_taps(PER_BANDWIDTH * PER_BANDWIDTH - 0.25, of.density, of.slope);
    make_taps(0.5 * PER_BANDWIDTH * PER_BANDWIDTH - 0.25, of.square, of.unused);
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(+ : refused)
    {
        float *own = malloc((size_t)(n + 1) * (2 * sizeof(float) + sizeof(int32_t)));
        struct room room = {own, own + n, (int32_t *)(own + 2 * n), 0, 0};
#pragma omp for schedule(static)
        for (int64_t s = 0; s < sites; s++)
            refused += !own || !smooth_site(x + s * n, weight ? weight + s * n : 0, n, &of, sampled, &room,
                                            found + FOUND * s, score ? score + s * n : 0);
        free(room.grids);
        free(own);
    }
    return refused;
}

/* dH_r / d eps of every site when its outputs move along a direction, equation (1'): out [sites]. x, score and found: as
   of eafo_smooth. moved: whether `direction` is x plus the direction instead. */
void eafo_entropy_gradient(const float *x, const float *score, const float *direction, const double *found,
                           int64_t sites, int64_t n, double resolution, int moved, int threads, double *out) {
    ROUND_PARALLEL
    for (int64_t s = 0; s < sites; s++) {
        const float *value = x + s * n, *along = score + s * n, *g = direction + s * n;
        const double *f = found + FOUND * s;
        float start = moved ? 1.0f : 0.0f;
        double rise[LANES] = {0}, together[LANES] = {0}, mean = f[3], inverse = f[4] > 0.0 ? 1.0 / f[4] : 0.0;
        IN_LANES(int known = isfinite(value[i]); double step = known ? g[i] - start * value[i] : 0.0f;
                 double at = known ? value[i] : 0.0f;
                 rise[k] += along[i] * step; together[k] += (at - mean) * step)
        double covariance = added(together) / f[0] * inverse;
        double slope = added(rise) / f[0] + (1.0 - resolution * resolution * f[6]) * covariance;
        out[s] = f[0] > 0.0 ? (f[4] > 0.0 ? -slope * inverse : 0.0) : NAN;
    }
}
