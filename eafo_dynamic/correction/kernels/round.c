/* What else an update round computes from the samples of all sites: outputs, moments, atoms and spacings, units that
   never fired. correction/stacked.py, density/statistics.py and entropy/spacings.py have the same in torch's
   operations. Shapes and missing samples as in entropy.c. */

#include "entropy.c"

#define MOST_WINDOWS 8192   /* as in spacings.py */
#define ATOM_SHARE 0.01f
#define MOST_UNITS (1 << 22)

/* out = derivative of c(z) by eps or by the lift. */
static void unit_direction(const float *z, float *out, int64_t n, int term, const float *shape, const float *table,
                           int intervals, float half_width, float clamp) {
    float one = 1.0f;
    memset(out, 0, sizeof(float) * (size_t)n);
    eafo_forward(z, out, 0, n, &one, term, shape, table, intervals, half_width, clamp, GIVEN, 0.0f, 1);
}

/* The functions of all sites: out [sites, n] = base(z) + c(z), by_eps, by_lift and by_gain [sites, n] = derivatives of c(z)
   by the amplitudes, the last one base(z); any of the four may be null.
   amplitudes [terms, sites]; which: the terms; shape [sites, 2] = mu, sigma; tables [.., 4, intervals]; place [sites]:
   index of the site's table, -1 for the closed form; base and below [sites]: as of eafo_forward. Rows of out hold base(z)
   before if the base is GIVEN; if `base` is null, out = c(z), which then has no gain. */
void eafo_functions(const float *z, int64_t sites, int64_t n, const float *amplitudes, int which, const float *shape,
                    const float *tables, const int64_t *place, int intervals, float half_width, float clamp,
                    const int32_t *base, const float *below, float *out, float *by_eps, float *by_lift, float *by_gain,
                    int threads) {
    ROUND_PARALLEL
    for (int64_t s = 0; s < sites; s++) {
        int64_t at = s * n, from = 4 * place[s] * intervals;
        int known = place[s] >= 0, wide = known ? intervals : 0, terms = 0;
        const float *form = shape + 2 * s, *table = known ? tables + from : 0;
        float own[4];
        for (int term = EPS; term <= SLOPE; term *= 2)
            if (which & term) own[terms] = amplitudes[terms * sites + s], terms++;
        if (by_eps) unit_direction(z + at, by_eps + at, n, EPS, form, table, wide, half_width, clamp);
        if (by_lift) unit_direction(z + at, by_lift + at, n, LIFT, form, 0, 0, half_width, clamp);
        if (by_gain && base[s] == GIVEN) memcpy(by_gain + at, out + at, sizeof(float) * (size_t)n);
        if (by_gain && base[s] != GIVEN)
            eafo_forward(z + at, by_gain + at, 0, n, own, 0, form, 0, 0, half_width, clamp, base[s], below[s], 1);
        if (!out) continue;
        if (!base) memset(out + at, 0, sizeof(float) * (size_t)n);
        eafo_forward(z + at, out + at, 0, n, own, which, form, table, wide, half_width, clamp, base ? base[s] : GIVEN,
                     base ? below[s] : 0.0f, 1);
    }
}

/* Number of samples, mean, standard deviation, skewness and excess kurtosis of every site: out [sites, 5]. */
void eafo_moments(const float *x, int64_t sites, int64_t n, int threads, double *out) {
    ROUND_PARALLEL
    for (int64_t s = 0; s < sites; s++) {
        const float *value = x + s * n;
        float low, high;
        double sum[LANES] = {0}, two[LANES] = {0}, three[LANES] = {0}, four[LANES] = {0}, count[LANES] = {0};
        range_of(value, 0, n, &low, &high);
        if (!(low <= high)) low = 0.0f;
        IN_LANES(int known = isfinite(value[i]); count[k] += known; sum[k] += known ? (double)value[i] - low : 0.0)
        double all = added(count), mean = added(sum) / all;
        IN_LANES(double off = isfinite(value[i]) ? (double)value[i] - low - mean : 0.0; double square = off * off;
                 two[k] += square; three[k] += off * square; four[k] += square * square)
        double m2 = added(two) / all, flat = all > 0.0 ? 0.0 : NAN;
        double *found = out + 5 * s;
        found[0] = all;
        found[1] = low + mean;
        found[2] = sqrt(m2);
        found[3] = m2 > 0.0 ? added(three) / all / (m2 * sqrt(m2)) : flat;
        found[4] = m2 > 0.0 ? added(four) / all / (m2 * m2) - 3.0 : flat;
    }
}

/* Fraction of the units of one site that never fired; NaN with fewer than per_unit samples per unit. Returns whether there
   was memory for one mark per unit: bit 0 for a unit with samples, bit 1 for one that fired. */
static int dead_share(const float *x, const float *unit, int64_t n, int per_unit, float *out) {
    float low, high;
    range_of(unit, 0, n, &low, &high);
    int64_t width = high >= 0.0f ? (int64_t)high + 1 : 1, present = 0, fired = 0, known = 0;
    unsigned char *seen = width <= MOST_UNITS ? calloc((size_t)width, 1) : 0;
    if (!seen) return 0;
    for (int64_t i = 0; i < n; i++) {
        if (x[i] == x[i]) {
            seen[(int32_t)unit[i]] |= x[i] > 0.0f ? 3 : 1;
            known++;
        }
    }
    for (int64_t u = 0; u < width; u++) {
        present += seen[u] & 1;
        fired += seen[u] >> 1;
    }
    *out = present && known >= per_unit * present ? (float)(present - fired) / (float)present : NAN;
    free(seen);
    return 1;
}

/* Fraction of the units that never fired, of every site: out [sites]. unit [sites, n], or [n] if shared: number of each
   sample's unit as a float, NaN only where x is. Returns the number of sites with too many units. */
int eafo_dead(const float *x, const float *unit, int shared, int64_t sites, int64_t n, int per_unit, int threads,
              float *out) {
    int refused = 0;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1) reduction(+ : refused)
    for (int64_t s = 0; s < sites; s++)
        refused += !dead_share(x + s * n, shared ? unit : unit + s * n, n, per_unit, out + s);
    return refused;
}

/* Starts and lengths of the atoms among sorted values: values that make up a share of ATOM_SHARE or more. Returns how many
   there are, at most 1 / ATOM_SHARE. */
static int atoms_of(const float *sorted, int64_t count, int64_t *start, int64_t *length) {
    int64_t gap = (int64_t)ceilf((float)count * ATOM_SHARE) - 1, i = 0;
    int found = 0;
    if (gap < 1) gap = 1;
    if (count == 1) {
        start[0] = 0;
        length[0] = 1;
    }
    while (i + gap < count) {
        if (sorted[i + gap] != sorted[i]) {
            i++;
            continue;
        }
        start[found] = i;
        i += gap + 1;
        while (i < count && sorted[i] == sorted[start[found]]) i++;
        length[found] = i - start[found];
        found++;
    }
    return count == 1 ? 1 : found;
}

static void add_logs(const double *x, int64_t n, double *part) { IN_LANES(part[k] += logarithm(x[i])) }

/* The sample with this rank among the samples on no atom. */
static inline double off_atoms(const float *sorted, int64_t rank, int atoms, const int64_t *start, const int64_t *length) {
    for (int a = 0; a < atoms; a++) rank += rank >= start[a] ? length[a] : 0;
    return sorted[rank];
}

/* Probability on atoms, and differential entropy of the other samples, of every site: out [sites, 2]; see
   spacings.atoms_and_rest. sorted [sites, n]: missing samples last; count [sites]: samples that are not missing;
   digamma [n + 2]: of 0, 1, ...; epsilon: relative rounding error of the samples. */
void eafo_spacings(const float *sorted, const double *count, int64_t sites, int64_t n, const double *digamma,
                   double epsilon, int threads, double *out) {
    ROUND_PARALLEL
    for (int64_t s = 0; s < sites; s++) {
        int64_t start[128], length[128], all = (int64_t)count[s], held = 0;
        int atoms = atoms_of(sorted + s * n, all, start, length);
        for (int a = 0; a < atoms; a++) held += length[a];
        int64_t rest = all - held, enough = rest < 2 ? 2 : rest;
        out[2 * s] = all ? (double)held / all : NAN;
        out[2 * s + 1] = all ? -INFINITY : NAN;
        if (rest < 2) continue;
        int64_t places = (int64_t)ceil(2.0 * pow(enough, 2.0 / 3.0)), half = (int64_t)rint(pow(enough, 1.0 / 3.0));
        places = places < enough ? places : enough;
        places = places < MOST_WINDOWS ? places : MOST_WINDOWS;
        half = half < 1 ? 1 : half;
        double width[MOST_WINDOWS], share = 0.0, logs[LANES] = {0};
        for (int64_t j = 0; j < places; j++) {
            int64_t centre = (int64_t)((j + 0.5) * ((double)enough / places));
            centre = centre < enough - 1 ? centre : enough - 1;
            int64_t low = centre - half > 0 ? centre - half : 0, high = centre + half;
            high = high < enough - 1 ? high : enough - 1;
            double bottom = off_atoms(sorted + s * n, low, atoms, start, length);
            double top = off_atoms(sorted + s * n, high, atoms, start, length);
            double least = epsilon * (fabs(top) > fabs(bottom) ? fabs(top) : fabs(bottom)), wide = top - bottom;
            wide = wide > least ? wide : least;
            width[j] = wide > 1e-300 ? wide : 1e-300;
            share += digamma[high - low];
        }
        add_logs(width, places, logs);
        out[2 * s + 1] = (added(logs) - share) / places + digamma[enough + 1];
    }
}
