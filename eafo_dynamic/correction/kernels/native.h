/* What the files of the kernel know of each other. native.c and mixed.c are compiled as one unit, entropy.c and round.c
   as another, side by side: most machines have two cores, and the user waits. */

#ifndef EAFO_NATIVE_H
#define EAFO_NATIVE_H

#include <stdint.h>
#include <string.h>

typedef float v4 __attribute__((vector_size(16), aligned(4), may_alias));

/* What f is made of beside the correction: what out holds already, or a function computed here in the same pass.
   The latter are float32 approximations as good as torch's own, but not bit for bit the same. */
enum base { GIVEN, KINK, SILU, GELU, GELU_TANH };

/* out = base(z) + c(z), where out holds base(z) already if the base is GIVEN.

   kept: room for a copy of z where out is z itself, else null; eps [1], lift [1] or null, shape [2] = mu, sigma; table
   [4, intervals] or null; below: slope of a KINK for z < 0. */
void eafo_forward(const float *z, float *out, float *kept, int64_t n, const float *eps, const float *lift,
                  const float *shape, const float *table, int intervals, float half_width, float clamp, int base,
                  float below, int threads);

#endif
