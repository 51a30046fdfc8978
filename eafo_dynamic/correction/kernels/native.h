/* What the C files share. mixed.c includes native.c, and round.c includes entropy.c: two units, compiled side by side,
   since most machines have two cores and the user waits. */

#ifndef EAFO_NATIVE_H
#define EAFO_NATIVE_H

#include <stdint.h>
#include <string.h>

typedef float v4 __attribute__((vector_size(16), aligned(4), may_alias));

/* The base of f = base + c: GIVEN for one that out holds already, else a function that is computed here in the same pass.
   KINK is z for z > 0 and a multiple of z below. The others are float32 approximations as accurate as torch's own, but
   not bit for bit the same. */
enum base { GIVEN, KINK, SILU, GELU, GELU_TANH };

/* The terms of c, as in directions.py. Amplitudes lie side by side in this order, those of absent terms left out. */
enum term { EPS = 1, LIFT = 2, GAIN = 4, SLOPE = 8, BUMP = EPS | LIFT, TAILS = GAIN | SLOPE };

/* out = base(z) + c(z) for n elements; if the base is GIVEN, out holds base(z) before.

   kept [n]: receives a copy of z if out is z itself, else null.
   amplitudes [terms]; which: the terms; shape [2] = mu, sigma; table [4, intervals] or null, up to half_width standard
   deviations. clamp: largest |u|. below: slope of a KINK for z < 0. threads: how many work at most. */
void eafo_forward(const float *z, float *out, float *kept, int64_t n, const float *amplitudes, int which,
                  const float *shape, const float *table, int intervals, float half_width, float clamp, int base,
                  float below, int threads);

#endif
