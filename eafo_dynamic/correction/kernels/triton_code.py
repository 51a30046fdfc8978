"""Base plus correction in Triton: one pass forward, one pass backward. Only ``gpu`` imports this module.

    c(z) = sigma * (eps * ghat(u) + lift * exp(-u^2 / 2)) + gain * base(z) + slope * z,   u = (z - mu) / sigma

as in native.c, computed in float32 whatever the dtype of z. A tensor is treated as a matrix [rows, columns], and each
program works on a tile of it:

- AXIS 0: one amplitude for all elements; the matrix is one long row.
- AXIS 1: one amplitude per column, as after a linear layer and in channels-last images.
- AXIS 2: one amplitude per row; row r belongs to channel r % channels, as in images of shape [batch, channels, ...].

TERMS is the sum of the codes of the terms: 1 for eps, 2 for the lift, 4 for the gain, 8 for the slope. Amplitudes lie
one term after the other, in this order.

BASE is the code of the base: 0 (GIVEN) for one that out holds already; 1 to 4 and 6 for functions that are computed
here as torch's CUDA kernels compute them, operation by operation; 5 (NOTHING) for -0.0, which changes nothing that it
is added to. There are no atomic operations: programs write partial sums, and which program sums which elements depends
only on the sizes.
"""

# pyright: basic, reportMissingImports=false
# no deferred annotations: Triton needs the object tl.constexpr
import triton
import triton.language as tl
from triton.language.extra import libdevice

__all__ = ["INTERPRETED", "backward", "forward"]


@triton.jit
def _exp(x, PRECISE: tl.constexpr):
    # libdevice's functions equal those of CUDA C++ bit for bit; tl.exp is faster, and two units in the last place off
    return libdevice.exp(x) if PRECISE else tl.exp(x)


@triton.jit
def _tanh(x, PRECISE: tl.constexpr):
    if PRECISE:
        y = libdevice.tanh(x)
    else:
        e = tl.exp(-2.0 * tl.abs(x))
        y = (1.0 - e) / (1.0 + e)
        y = tl.where(x < 0.0, -y, y)
    return y


@triton.jit
def _minus_zeros(z):
    # from the sign bit: a literal -0.0 becomes +0.0 in Triton
    return ((z.to(tl.int32, bitcast=True) | -2147483648) & -2147483648).to(tl.float32, bitcast=True)


@triton.jit
def _base_value(z, below, BASE: tl.constexpr, PRECISE: tl.constexpr):
    """Values base(z)."""
    if BASE == 1:  # ReLU
        y = tl.where((z > 0.0) | (z != z), z, 0.0)
    elif BASE == 2:  # SiLU
        y = tl.div_rn(z, 1.0 + _exp(-z, PRECISE))
    elif BASE == 3:  # GELU
        y = z * 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
    elif BASE == 4:  # GELU with tanh; 0.797... = sqrt(2 / pi)
        y = 0.5 * z * (1.0 + _tanh(0.7978845608028654 * (z + 0.044715 * (z * z * z)), PRECISE))
    elif BASE == 5:  # NOTHING
        y = _minus_zeros(z)
    else:  # leaky ReLU
        y = tl.where(z > 0.0, z, z * below)
    return y


@triton.jit
def _base_gradient(grad, z, below, BASE: tl.constexpr, PRECISE: tl.constexpr):
    """Gradients grad * base'(z)."""
    if BASE == 1:
        y = tl.where((z > 0.0) | (z != z), grad, 0.0)
    elif BASE == 2:
        s = tl.div_rn(1.0, 1.0 + _exp(-z, PRECISE))
        y = grad * s * (1.0 + z * (1.0 - s))
    elif BASE == 3:
        cdf = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        y = grad * (cdf + z * (_exp(-0.5 * z * z, PRECISE) * 0.3989422804014327))
    elif BASE == 4:
        square = z * z
        t = _tanh(0.7978845608028654 * (z + 0.044715 * (square * z)), PRECISE)
        inner = 0.7978845608028654 * (1.0 + 0.13414499163627625 * square)
        y = grad * (0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * inner)
    elif BASE == 5:
        y = _minus_zeros(z)
    else:
        y = tl.where(z > 0.0, grad, grad * below)
    return y


@triton.jit
def _plus(a, c):
    """The sum, which is a bit for bit where c is zero; adding +0.0 would turn -0.0 into +0.0."""
    return tl.where(c == 0.0, a, a + c)


@triton.jit
def _bell(z, mu, inverse):
    """u, clamped to MAX_U, and exp(-u^2 / 2); a NaN counts as -MAX_U, the base passes it on."""
    u = (z - mu) * inverse
    u = tl.where(u > -13.0, u, -13.0)
    u = tl.where(u > 13.0, 13.0, u)
    return u, tl.exp(-0.5 * u * u)


@triton.jit
def _place(z, mu, inverse, half_width, per_sd, INTERVALS: tl.constexpr):
    """Interval, and place inside it in [0, 1]; a NaN counts as the left end."""
    place = ((z - mu) * inverse + half_width) * per_sd
    place = tl.where(place > 0.0, place, 0.0)
    place = tl.where(place < INTERVALS, place, INTERVALS * 1.0)
    k = tl.minimum(place.to(tl.int32), INTERVALS - 1)
    return k, place - k.to(tl.float32)


@triton.jit
def _cubic(table, k, t, INTERVALS: tl.constexpr):
    """Value of a cubic, and its slope per interval."""
    a0, a1 = tl.load(table + k).to(tl.float32), tl.load(table + INTERVALS + k).to(tl.float32)
    a2, a3 = tl.load(table + 2 * INTERVALS + k).to(tl.float32), tl.load(table + 3 * INTERVALS + k).to(tl.float32)
    return ((a3 * t + a2) * t + a1) * t + a0, (3.0 * a3 * t + 2.0 * a2) * t + a1


@triton.jit
def _finite(x):
    """X, or 0 for infinities and NaN."""
    return tl.where(x - x == 0.0, x, 0.0)


@triton.jit
def _rows_before(TERMS: tl.constexpr, TERM: tl.constexpr):
    """How many of the terms come before one of them."""
    before = 0
    if TERM > 1 and TERMS & 1:
        before += 1
    if TERM > 2 and TERMS & 2:
        before += 1
    if TERM > 4 and TERMS & 4:
        before += 1
    return before


@triton.jit
def _amplitude(
    pointer, row, column, row_ok, column_ok, channels, TERMS: tl.constexpr, TERM: tl.constexpr, AXIS: tl.constexpr
):
    """The amplitudes of a term for a tile: one number, one per column or one per row."""
    pointer += _rows_before(TERMS, TERM) * channels
    if AXIS == 0:
        e = tl.load(pointer).to(tl.float32)
    elif AXIS == 1:
        e = tl.load(pointer + column, mask=column_ok, other=0.0).to(tl.float32)[None, :]
    else:
        e = tl.load(pointer + row % channels, mask=row_ok, other=0.0).to(tl.float32)[:, None]
    return e


@triton.jit
def _table_slope(z, mu, inverse, e, table, half_width, per_sd, INTERVALS: tl.constexpr):
    """Slope of c(z) for a ghat that is a table, and ghat itself."""
    # a type checker believes that the next line raises, as it does when called from Python
    interval, t = _place(z, mu, inverse, half_width, per_sd, INTERVALS)  # pyright: ignore[reportGeneralTypeIssues]
    value, slope = _cubic(table, interval, t, INTERVALS)
    return e * slope * per_sd, value


@triton.jit
def _summed(tile, AXIS: tl.constexpr):
    """Sums of the elements of a tile that share an amplitude: one, one per column or one per row."""
    if AXIS == 0:
        sums = tl.sum(tl.sum(tile, 1), 0)
    elif AXIS == 1:
        sums = tl.sum(tile, 0)
    else:
        sums = tl.sum(tile, 1)
    return sums


@triton.jit
def forward(
    z_pointer,
    out_pointer,
    amplitude_pointer,
    shape_pointer,
    table_pointer,
    rows,
    columns,
    channels,
    half_width,
    per_sd,
    below,
    BASE: tl.constexpr,
    INTERVALS: tl.constexpr,
    TERMS: tl.constexpr,
    AXIS: tl.constexpr,
    PRECISE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Writes base(z) + c(z) to out; if the base is GIVEN, out holds base(z) before."""
    across = (columns + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    first_row, first_column = (program // across).to(tl.int64) * ROWS, (program % across).to(tl.int64) * COLUMNS
    r, k = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    row_ok, column_ok = first_row + r < rows, first_column + k < columns
    ok = row_ok[:, None] & column_ok[None, :]
    start = first_row * columns + first_column  # in 64 bits; inside a tile, 32 are enough
    at = r[:, None] * columns + k[None, :]
    z = tl.load(z_pointer + start + at, mask=ok, other=0.0).to(tl.float32)
    mu, sigma = tl.load(shape_pointer).to(tl.float32), tl.load(shape_pointer + 1).to(tl.float32)
    inverse = tl.div_rn(1.0, sigma)
    row, column = first_row + r, first_column + k
    c = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    if TERMS & 1:
        e = _amplitude(amplitude_pointer, row, column, row_ok, column_ok, channels, TERMS, 1, AXIS)
        if INTERVALS:
            interval, t = _place(z, mu, inverse, half_width, per_sd, INTERVALS)
            value, _ = _cubic(table_pointer, interval, t, INTERVALS)
            c = e * value * sigma
        else:
            u, peak = _bell(z, mu, inverse)
            c = e * sigma * u
            if TERMS & 2:
                c += _amplitude(amplitude_pointer, row, column, row_ok, column_ok, channels, TERMS, 2, AXIS) * sigma
            c *= peak
    elif TERMS & 2:
        u, peak = _bell(z, mu, inverse)
        c = _amplitude(amplitude_pointer, row, column, row_ok, column_ok, channels, TERMS, 2, AXIS) * sigma * peak
    if BASE:
        y = _base_value(z, below, BASE, PRECISE)
    else:
        y = tl.load(out_pointer + start + at, mask=ok, other=0.0).to(tl.float32)
    if TERMS & 4:
        c += _amplitude(amplitude_pointer, row, column, row_ok, column_ok, channels, TERMS, 4, AXIS) * _finite(y)
    if TERMS & 8:
        c += _amplitude(amplitude_pointer, row, column, row_ok, column_ok, channels, TERMS, 8, AXIS) * _finite(z)
    tl.store(out_pointer + start + at, _plus(y, c).to(out_pointer.dtype.element_ty), mask=ok)


@triton.jit
def backward(
    z_pointer,
    grad_pointer,
    value_pointer,
    out_pointer,
    partial_pointer,
    amplitude_pointer,
    shape_pointer,
    table_pointer,
    rows,
    columns,
    channels,
    partials,
    half_width,
    per_sd,
    below,
    BASE: tl.constexpr,
    INTERVALS: tl.constexpr,
    TERMS: tl.constexpr,
    AXIS: tl.constexpr,
    PRECISE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Writes grad (base' + c')(z) to out; if the base is GIVEN, out holds grad base'(z) before, and value base(z).

    A program works on STEPS tiles, below each other for AXIS 1, else side by side. It writes its sums of grad times the
    direction of the first term to ``partial``, and those of each further term ``partials`` numbers further on. Their
    shape is [programs] for AXIS 0, [programs down, columns] for AXIS 1 and [rows, programs across] for AXIS 2.
    """
    wide = COLUMNS if AXIS == 1 else COLUMNS * STEPS
    high = ROWS * STEPS if AXIS == 1 else ROWS
    across = (columns + wide - 1) // wide
    program = tl.program_id(0)
    down, right = program // across, program % across
    first_row, first_column = down.to(tl.int64) * high, right.to(tl.int64) * wide
    r, k = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    at = r[:, None] * columns + k[None, :]
    mu, sigma = tl.load(shape_pointer).to(tl.float32), tl.load(shape_pointer + 1).to(tl.float32)
    inverse = tl.div_rn(1.0, sigma)
    row_ok, column_ok = first_row + r < rows, first_column + k < columns
    own_row, own_column = first_row + r, first_column + k
    e, lift, gain, slope = 0.0, 0.0, 0.0, 0.0
    if TERMS & 1:
        e = _amplitude(amplitude_pointer, own_row, own_column, row_ok, column_ok, channels, TERMS, 1, AXIS)
    if TERMS & 2:
        lift = _amplitude(amplitude_pointer, own_row, own_column, row_ok, column_ok, channels, TERMS, 2, AXIS)
    if TERMS & 4:
        gain = _amplitude(amplitude_pointer, own_row, own_column, row_ok, column_ok, channels, TERMS, 4, AXIS)
    if TERMS & 8:
        slope = _amplitude(amplitude_pointer, own_row, own_column, row_ok, column_ok, channels, TERMS, 8, AXIS)
    by_eps = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    by_lift = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    by_gain = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    by_slope = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for step in range(STEPS):
        row = first_row + (step * ROWS if AXIS == 1 else 0)
        column = first_column + (0 if AXIS == 1 else step * COLUMNS)
        ok = (row + r < rows)[:, None] & (column + k < columns)[None, :]
        start = row * columns + column
        z = tl.load(z_pointer + start + at, mask=ok, other=0.0).to(tl.float32)
        grad = tl.load(grad_pointer + start + at, mask=ok, other=0.0).to(tl.float32)
        c = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        if INTERVALS and TERMS & 1:
            c, value = _table_slope(z, mu, inverse, e, table_pointer, half_width, per_sd, INTERVALS)
            by_eps += grad * value
        elif TERMS & 3:
            u, peak = _bell(z, mu, inverse)
            if TERMS & 1:
                c = e * (1.0 - u * u)
                by_eps += grad * (u * peak)
            if TERMS & 2:
                c -= lift * u
                by_lift += grad * peak
            c *= peak
        if TERMS & 8:
            c += slope * tl.where(z - z == 0.0, 1.0, 0.0)
            by_slope += grad * _finite(z)
        if BASE:
            y = _base_gradient(grad, z, below, BASE, PRECISE)
        else:
            y = tl.load(out_pointer + start + at, mask=ok, other=0.0).to(tl.float32)
        if TERMS & 4:
            if BASE:
                base = _base_value(z, below, BASE, PRECISE)
            else:
                base = tl.load(value_pointer + start + at, mask=ok, other=0.0).to(tl.float32)
            stretch = gain * tl.where(base - base == 0.0, 1.0, 0.0)
            y = tl.where(stretch == 0.0, y, y + stretch * y)  # 0 * inf is not 0
            by_gain += grad * _finite(base)
        y = tl.where(c == 0.0, y, _plus(y, grad * c))
        tl.store(out_pointer + start + at, y.to(out_pointer.dtype.element_ty), mask=ok)
    if AXIS == 0:
        into, ok = partial_pointer + program, True
    elif AXIS == 1:
        into, ok = partial_pointer + down.to(tl.int64) * columns + first_column + k, column_ok
    else:
        into, ok = partial_pointer + (first_row + r) * across + right, row_ok
    if TERMS & 1:
        tl.store(into, _summed(by_eps, AXIS) * sigma, mask=ok)
    if TERMS & 2:
        tl.store(into + _rows_before(TERMS, 2) * partials, _summed(by_lift, AXIS) * sigma, mask=ok)
    if TERMS & 4:
        tl.store(into + _rows_before(TERMS, 4) * partials, _summed(by_gain, AXIS), mask=ok)
    if TERMS & 8:
        tl.store(into + _rows_before(TERMS, 8) * partials, _summed(by_slope, AXIS), mask=ok)


INTERPRETED = not isinstance(forward, triton.JITFunction)
"""Whether this code is interpreted on the CPU (TRITON_INTERPRET=1), where there is no libdevice."""
