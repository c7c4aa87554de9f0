"""Triton kernels of BatchNorm per view. What they compute and how they are launched: batch_norm.py.

Absent tensors are None, and the kernels are compiled without them.

Shapes: V views of R positions (rows) and C channels; x is (V R, C) in memory. P = programs per view
that share its rows. A program's tile has BLOCK_ROWS x BLOCK_CHANNELS values. Axis 0 of the grid
holds row blocks and channel blocks, channels first, since the other axes end at 65,535; axis 1
holds the views.
"""

import triton
import triton.language as tl

# --- shared by the kernels ---


@triton.jit
def _tile(channels, BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """Return this program's row block, the number of row blocks, its channels, which of them exist,
    and the offsets of its tile.
    """
    columns = tl.cdiv(channels, BLOCK_CHANNELS)
    c = tl.program_id(0) % columns * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    offsets = tl.arange(0, BLOCK_ROWS)[:, None] * channels + c[None, :]
    return tl.program_id(0) // columns, tl.num_programs(0) // columns, c, c < channels, offsets


@triton.jit
def part_of_view(part, parts, rows, BLOCK_ROWS: tl.constexpr):
    """Return the first row of a part of a view, and the row after its last."""
    length = tl.cdiv(tl.cdiv(rows, BLOCK_ROWS), parts) * BLOCK_ROWS
    return part * length, tl.minimum((part + 1) * length, rows)


@triton.jit
def affine(stats, weight, bias, view, views, channels, c, inside, eps: tl.constexpr):
    """Return f, delta, invstd, scale and offset of channels `c`: y = (x - f) scale + offset."""
    at = stats + view * channels + c
    step = views * channels
    first = tl.load(at, mask=inside, other=0.0)
    delta = tl.load(at + step, mask=inside, other=0.0)
    invstd = 1.0 / tl.sqrt_rn(tl.load(at + 2 * step, mask=inside, other=0.0) + eps)
    scale = tl.load(weight + c, mask=inside, other=0.0) * invstd
    return first, delta, invstd, scale, tl.load(bias + c, mask=inside, other=0.0) - delta * scale


@triton.jit
def _mask_pointers(mask, first_row, channels, BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """Return the addresses of a tile's bytes in the mask, and which columns of them exist."""
    width = tl.cdiv(channels, 8)
    column = tl.program_id(0) % tl.cdiv(channels, BLOCK_CHANNELS)
    j = column * (BLOCK_CHANNELS // 8) + tl.arange(0, BLOCK_CHANNELS // 8)
    rows = first_row + tl.arange(0, BLOCK_ROWS)
    return mask + rows[:, None] * width + j[None, :], (j < width)[None, :]


@triton.jit
def _padding_before(size, SAME: tl.constexpr):
    """Return the padding of the max-pool before a side, as kernels/max_pool.py."""
    return size % 2 if SAME else 1


@triton.jit
def _unpooled(
    dy,
    dy2,
    places,
    view,
    rows,
    row,
    exists,
    c,
    channels,
    height,
    width,
    SAME: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Return a tile of the gradient of y from the gradient of the pooled y.

    Row s of the padded image is in window (s - 1) // 2 and, if s is even, in window s / 2.
    """
    r = row + tl.arange(0, BLOCK_ROWS)
    h, w = r % (height * width) // width, r % width
    image = view * (rows // (height * width)) + r // (height * width)
    pooled_height, pooled_width = (height + 1) // 2, (width + 1) // 2
    s, t = h + _padding_before(height, SAME), w + _padding_before(width, SAME)
    value = tl.zeros(exists.shape, tl.float32)
    for a in tl.static_range(2):
        for b in tl.static_range(2):
            p, q = (s - 1 + a) // 2, (t - 1 + b) // 2
            place = 3 * (s - 2 * p) + t - 2 * q
            valid = (p < pooled_height) & (q < pooled_width)
            valid = valid & (s > 0 if a == 0 else s % 2 == 0)
            valid = valid & (t > 0 if b == 0 else t % 2 == 0)
            position = (image.to(tl.int64) * pooled_height + p) * pooled_width + q
            at = position[:, None] * channels + c[None, :]
            chosen = exists & valid[:, None]
            found = tl.load(places + at, mask=chosen, other=255).to(tl.int32) == place[:, None]
            part = tl.load(dy + at, mask=chosen, other=0.0).to(tl.float32)
            if dy2 is not None:
                part += tl.load(dy2 + at, mask=chosen, other=0.0).to(tl.float32)
            value += tl.where(found, part, 0.0)
    return value


@triton.jit
def _masked_gradient(
    dy,
    dy2,
    mask,
    places,
    d,
    scale,
    offset,
    view,
    rows,
    row,
    exists,
    c,
    offsets,
    channels,
    height,
    width,
    SAME: tl.constexpr,
    MASK_FROM_X: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Return a tile of g: dy + dy2, or that of the pooled y, where y is positive."""
    first_row = view.to(tl.int64) * rows + row
    if places is not None:
        g = _unpooled(dy, dy2, places, view, rows, row, exists, c, channels, height, width, SAME, BLOCK_ROWS)
    else:
        g = tl.load(dy + first_row * channels + offsets, mask=exists, other=0.0).to(tl.float32)
        if dy2 is not None:
            g += tl.load(dy2 + first_row * channels + offsets, mask=exists, other=0.0).to(tl.float32)
    if MASK_FROM_X:
        g = tl.where(d * scale[None, :] + offset[None, :] <= 0.0, 0.0, g)  # NaN passes
    if mask is not None:
        pointers, inside = _mask_pointers(mask, first_row, channels, BLOCK_ROWS, BLOCK_CHANNELS)
        in_view = (row + tl.arange(0, BLOCK_ROWS) < rows)[:, None]
        packed = tl.load(pointers, mask=in_view & inside, other=0).to(tl.int32)
        bits = (packed[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
        g = tl.where(bits.reshape(BLOCK_ROWS, BLOCK_CHANNELS) == 0, 0.0, g)
    return g


@triton.jit
def _total(partials, parts, channels, c, inside, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Return the float64 sum over parts of (P, C) partial sums."""
    total = tl.zeros((ROWS, CHANNELS), tl.float64)
    for part in range(0, parts, ROWS):
        at = part + tl.arange(0, ROWS)
        exists = (at < parts)[:, None] & inside[None, :]
        total += tl.load(partials + at[:, None] * channels + c[None, :], mask=exists, other=0.0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def _slopes(means, norm, view, views, channels, c, inside, scale, invstd, delta):
    """Return slope and constant of dx = scale g + slope d + constant."""
    mean_g = tl.load(means + view * channels + c, mask=inside, other=0.0)
    mean_gx = tl.load(means + ((1 + norm) * views + view) * channels + c, mask=inside, other=0.0)
    slope = -scale * invstd * mean_gx
    return slope, -scale * mean_g - slope * delta


# --- forward ---


@triton.jit
def moments_kernel(
    x,
    stats,  # (3, V, C) float32, of which f is written
    partials,  # (2, V, P, C) float32: sums of d and d^2
    rows,
    channels,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Partial sums of d and d^2."""
    part, parts, c, inside, offsets = _tile(channels, BLOCK_ROWS, BLOCK_CHANNELS)
    view, views = tl.program_id(1), tl.num_programs(1)
    origin = view.to(tl.int64) * rows
    first = tl.load(x + origin * channels + c, mask=inside, other=0.0).to(tl.float32)
    if part == 0:
        tl.store(stats + view * channels + c, first, mask=inside)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.float32)
    squares = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.float32)
    start, end = part_of_view(part, parts, rows, BLOCK_ROWS)
    for row in range(start, end, BLOCK_ROWS):
        exists = (row + tl.arange(0, BLOCK_ROWS) < end)[:, None] & inside[None, :]
        value = tl.load(x + (origin + row) * channels + offsets, mask=exists, other=0.0)
        d = tl.where(exists, value.to(tl.float32) - first[None, :], 0.0)
        sums += d
        squares += d * d
    out = partials + (view * parts + part) * channels + c
    tl.store(out, tl.sum(sums, 0), mask=inside)
    tl.store(out + views * parts * channels, tl.sum(squares, 0), mask=inside)


@triton.jit
def _merge(partials, part_rows, parts, rows, views, channels, c, inside, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Return float64 mean and variance from mean and M2 of parts of `part_rows` rows.

    Chan, Golub and LeVeque 1979.
    """
    sums = tl.zeros((ROWS, CHANNELS), tl.float64)
    squares = tl.zeros((ROWS, CHANNELS), tl.float64)
    for part in range(0, parts, ROWS):
        at = part + tl.arange(0, ROWS)
        count = tl.minimum(tl.maximum(rows - at * part_rows, 0), part_rows).to(tl.float64)[:, None]
        exists = (at < parts)[:, None] & inside[None, :]
        pointers = partials + at[:, None] * channels + c[None, :]
        mean = tl.load(pointers, mask=exists, other=0.0).to(tl.float64)
        square = tl.load(pointers + views * parts * channels, mask=exists, other=0.0).to(tl.float64)
        sums += count * mean
        squares += square + count * mean * mean
    mean = tl.sum(sums, 0) / rows
    return mean, tl.sum(squares, 0) / rows - mean * mean


@triton.jit
def finish_moments_kernel(
    partials,
    stats,
    running_mean,  # (C,) float32, updated once per view; or None
    running_var,
    batches,  # scalar int64, counts views
    rows,
    channels,
    parts,
    part_rows,  # None: partials are those of `moments_kernel`, else of `conv1x1_kernel`
    momentum: tl.constexpr,
    VIEWS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Statistics of all views from the partial sums, and the running statistics."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = c < channels
    if running_mean is not None:
        average = tl.load(running_mean + c, mask=inside, other=0.0)
        spread = tl.load(running_var + c, mask=inside, other=0.0)
    for view in tl.static_range(VIEWS):
        sums = partials + view * parts * channels
        out = stats + view * channels + c
        if part_rows is not None:
            mean64, wide = _merge(sums, part_rows, parts, rows, VIEWS, channels, c, inside, ROWS, CHANNELS)
            first = mean64.to(tl.float32)
            delta = mean64 - first.to(tl.float64)
            tl.store(out, first, mask=inside)
        else:
            first = tl.load(out, mask=inside, other=0.0)
            delta = _total(sums, parts, channels, c, inside, ROWS, CHANNELS) / rows
            square = _total(sums + VIEWS * parts * channels, parts, channels, c, inside, ROWS, CHANNELS) / rows
            wide = square - delta * delta
        var = tl.where(wide < 0, 0.0, wide).to(tl.float32)  # NaN stays NaN
        tl.store(out + VIEWS * channels, delta.to(tl.float32), mask=inside)
        tl.store(out + 2 * VIEWS * channels, var, mask=inside)
        if running_mean is not None:
            mean = first + delta.to(tl.float32)
            average += momentum * (mean - average)
            spread += momentum * (var * (rows / tl.maximum(rows - 1, 1)) - spread)
    if running_mean is not None:
        tl.store(running_mean + c, average, mask=inside)
        tl.store(running_var + c, spread, mask=inside)
        if tl.program_id(0) == 0:
            tl.store(batches, tl.load(batches) + VIEWS)


@triton.jit
def apply_kernel(
    x,
    residual,
    y,
    mask,  # (V R, ceil(C / 8)) uint8: bit k of byte j is set where channel 8 j + k of y is positive
    stats,
    weight,
    bias,
    residual_stats,
    residual_weight,
    residual_bias,
    rows,
    channels,
    eps: tl.constexpr,
    residual_eps: tl.constexpr,
    RELU: tl.constexpr,
    ITERATIONS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Write ITERATIONS tiles of y."""
    block, _, c, inside, offsets = _tile(channels, BLOCK_ROWS, BLOCK_CHANNELS)
    view, views = tl.program_id(1), tl.num_programs(1)
    first, _, _, scale, offset = affine(stats, weight, bias, view, views, channels, c, inside, eps)
    if residual_stats is not None:
        r_first, _, _, r_scale, r_offset = affine(
            residual_stats, residual_weight, residual_bias, view, views, channels, c, inside, residual_eps
        )
    start = block * ITERATIONS * BLOCK_ROWS
    for row in range(start, tl.minimum(start + ITERATIONS * BLOCK_ROWS, rows), BLOCK_ROWS):
        in_view = (row + tl.arange(0, BLOCK_ROWS) < rows)[:, None]
        exists = in_view & inside[None, :]
        first_row = view.to(tl.int64) * rows + row
        base = first_row * channels
        value = tl.load(x + base + offsets, mask=exists, other=0.0).to(tl.float32)
        out = (value - first[None, :]) * scale[None, :] + offset[None, :]
        if residual is not None:
            more = tl.load(residual + base + offsets, mask=exists, other=0.0).to(tl.float32)
            if residual_stats is not None:
                more = (more - r_first[None, :]) * r_scale[None, :] + r_offset[None, :]
            out += more
        if RELU:
            blocked = out <= 0.0  # NaN is not
            out = tl.where(blocked, 0.0, out)
            if mask is not None:
                bits = tl.where(blocked, 0, 1).to(tl.int32).reshape(BLOCK_ROWS, BLOCK_CHANNELS // 8, 8)
                packed = tl.sum(bits << tl.arange(0, 8)[None, None, :], 2)
                pointers, in_mask = _mask_pointers(mask, first_row, channels, BLOCK_ROWS, BLOCK_CHANNELS)
                tl.store(pointers, packed.to(tl.uint8), mask=in_view & in_mask)
        tl.store(y + base + offsets, out.to(y.dtype.element_ty), mask=exists)


@triton.jit
def apply_and_pool_kernel(
    x,  # (V N, H, W, C)
    y,  # (V N, P, Q, C)
    places,  # like y, uint8: 3 i + j of the maximum's tap (i, j) in its window
    stats,
    weight,
    bias,
    rows,  # N P Q, of one view
    channels,
    height,
    width,
    eps: tl.constexpr,
    SAME: tl.constexpr,
    ITERATIONS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Max-pool of relu(BatchNorm(x)), as kernels/max_pool.py."""
    block, _, c, inside, offsets = _tile(channels, BLOCK_ROWS, BLOCK_CHANNELS)
    view, views = tl.program_id(1), tl.num_programs(1)
    first, _, _, scale, offset = affine(stats, weight, bias, view, views, channels, c, inside, eps)
    pooled_height, pooled_width = (height + 1) // 2, (width + 1) // 2
    a, b = _padding_before(height, SAME), _padding_before(width, SAME)
    start = block * ITERATIONS * BLOCK_ROWS
    for row in range(start, tl.minimum(start + ITERATIONS * BLOCK_ROWS, rows), BLOCK_ROWS):
        r = row + tl.arange(0, BLOCK_ROWS)
        exists = (r < rows)[:, None] & inside[None, :]
        p, q = r % (pooled_height * pooled_width) // pooled_width, r % pooled_width
        image = view * (rows // (pooled_height * pooled_width)) + r // (pooled_height * pooled_width)
        best = tl.full((BLOCK_ROWS, BLOCK_CHANNELS), float("-inf"), tl.float32)
        place = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.int32)
        for i in tl.static_range(3):
            for j in tl.static_range(3):
                h, w = 2 * p - a + i, 2 * q - b + j
                valid = (h >= 0) & (h < height) & (w >= 0) & (w < width)
                position = (image.to(tl.int64) * height + h) * width + w
                chosen = exists & valid[:, None]
                value = tl.load(x + position[:, None] * channels + c[None, :], mask=chosen, other=0.0).to(tl.float32)
                out = (value - first[None, :]) * scale[None, :] + offset[None, :]
                out = tl.where(out <= 0.0, 0.0, out).to(y.dtype.element_ty).to(tl.float32)  # ties as in a stored y
                better = chosen & ((out > best) | (out != out))
                best = tl.where(better, out, best)
                place = tl.where(better, 3 * i + j, place)
        base = (view.to(tl.int64) * rows + row) * channels
        tl.store(y + base + offsets, best.to(y.dtype.element_ty), mask=exists)
        tl.store(places + base + offsets, place.to(tl.uint8), mask=exists)


# --- backward ---


@triton.jit
def sums_kernel(
    x,
    dy,  # of y, or of the pooled y with `places`
    dy2,  # added to dy
    mask,
    places,
    residual,
    g,
    partials,  # (1 + N, V, P, C) float32: sums of g, and of g d for each of N norms
    stats,
    weight,
    bias,
    residual_stats,
    rows,
    channels,
    height,
    width,
    eps: tl.constexpr,
    SAME: tl.constexpr,
    MASK_FROM_X: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Partial sums of g and g d, and g itself if asked for."""
    part, parts, c, inside, offsets = _tile(channels, BLOCK_ROWS, BLOCK_CHANNELS)
    view, views = tl.program_id(1), tl.num_programs(1)
    first, _, _, scale, offset = affine(stats, weight, bias, view, views, channels, c, inside, eps)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.float32)
    products = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.float32)
    if residual_stats is not None:
        r_first = tl.load(residual_stats + view * channels + c, mask=inside, other=0.0)
        r_products = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.float32)
    start, end = part_of_view(part, parts, rows, BLOCK_ROWS)
    for row in range(start, end, BLOCK_ROWS):
        exists = (row + tl.arange(0, BLOCK_ROWS) < end)[:, None] & inside[None, :]
        base = (view.to(tl.int64) * rows + row) * channels
        d = tl.load(x + base + offsets, mask=exists, other=0.0).to(tl.float32) - first[None, :]
        value = _masked_gradient(
            *(dy, dy2, mask, places, d, scale, offset, view, rows, row, exists, c, offsets, channels, height, width),
            *(SAME, MASK_FROM_X, BLOCK_ROWS, BLOCK_CHANNELS),
        )
        if g is not None:
            rounded = value.to(g.dtype.element_ty)
            tl.store(g + base + offsets, rounded, mask=exists)
            value = rounded.to(tl.float32)  # as `gradient_kernel` reads it
        sums += value
        products += value * tl.where(exists, d, 0.0)
        if residual_stats is not None:
            more = tl.load(residual + base + offsets, mask=exists, other=0.0).to(tl.float32)
            r_products += value * tl.where(exists, more - r_first[None, :], 0.0)
    out = partials + (view * parts + part) * channels + c
    tl.store(out, tl.sum(sums, 0), mask=inside)
    tl.store(out + views * parts * channels, tl.sum(products, 0), mask=inside)
    if residual_stats is not None:
        tl.store(out + 2 * views * parts * channels, tl.sum(r_products, 0), mask=inside)


@triton.jit
def finish_sums_kernel(
    partials,
    stats,
    residual_stats,
    means,  # (1 + N, V, C) float32: mean g, and mean(g xhat) of each norm
    gradients,  # (2 N, C) float32: dw and db of each norm; db is the same for all
    rows,
    channels,
    parts,
    eps: tl.constexpr,
    residual_eps: tl.constexpr,
    VIEWS: tl.constexpr,
    NORMS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Means over the positions of each view, and the gradients of weights and bias."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = c < channels
    for norm in tl.static_range(NORMS):
        table = stats if norm == 0 else residual_stats
        constant = eps if norm == 0 else residual_eps
        dw = tl.zeros((CHANNELS,), tl.float64)
        db = tl.zeros((CHANNELS,), tl.float64)
        for view in tl.static_range(VIEWS):
            part = partials + view * parts * channels
            total = _total(part, parts, channels, c, inside, ROWS, CHANNELS)
            product = _total(part + (1 + norm) * VIEWS * parts * channels, parts, channels, c, inside, ROWS, CHANNELS)
            delta = tl.load(table + (VIEWS + view) * channels + c, mask=inside, other=0.0)
            var = tl.load(table + (2 * VIEWS + view) * channels + c, mask=inside, other=0.0)
            product = (product - delta * total) * (1.0 / tl.sqrt_rn(var + constant))
            if norm == 0:
                tl.store(means + view * channels + c, (total / rows).to(tl.float32), mask=inside)
            out = means + ((1 + norm) * VIEWS + view) * channels + c
            tl.store(out, (product / rows).to(tl.float32), mask=inside)
            dw += product
            db += total
        tl.store(gradients + 2 * norm * channels + c, dw.to(tl.float32), mask=inside)
        tl.store(gradients + (2 * norm + 1) * channels + c, db.to(tl.float32), mask=inside)


@triton.jit
def gradient_kernel(
    x,
    g,  # g, or dy as in `sums_kernel`
    g2,
    places,
    residual,
    dx,
    d_residual,
    means,
    stats,
    weight,
    bias,
    residual_stats,
    residual_weight,
    residual_bias,
    rows,
    channels,
    height,
    width,
    eps: tl.constexpr,
    residual_eps: tl.constexpr,
    SAME: tl.constexpr,
    MASK_FROM_X: tl.constexpr,
    ITERATIONS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Write ITERATIONS tiles of dx, and of the gradient of a normalized residual."""
    block, _, c, inside, offsets = _tile(channels, BLOCK_ROWS, BLOCK_CHANNELS)
    view, views = tl.program_id(1), tl.num_programs(1)
    first, delta, invstd, scale, offset = affine(stats, weight, bias, view, views, channels, c, inside, eps)
    slope, constant = _slopes(means, 0, view, views, channels, c, inside, scale, invstd, delta)
    if residual_stats is not None:
        r_first, r_delta, r_invstd, r_scale, _ = affine(
            residual_stats, residual_weight, residual_bias, view, views, channels, c, inside, residual_eps
        )
        r_slope, r_constant = _slopes(means, 1, view, views, channels, c, inside, r_scale, r_invstd, r_delta)
    start = block * ITERATIONS * BLOCK_ROWS
    for row in range(start, tl.minimum(start + ITERATIONS * BLOCK_ROWS, rows), BLOCK_ROWS):
        exists = (row + tl.arange(0, BLOCK_ROWS) < rows)[:, None] & inside[None, :]
        base = (view.to(tl.int64) * rows + row) * channels
        d = tl.load(x + base + offsets, mask=exists, other=0.0).to(tl.float32) - first[None, :]
        value = _masked_gradient(
            *(g, g2, None, places, d, scale, offset, view, rows, row, exists, c, offsets, channels, height, width),
            *(SAME, MASK_FROM_X, BLOCK_ROWS, BLOCK_CHANNELS),
        )
        out = value * scale[None, :] + (d * slope[None, :] + constant[None, :])
        tl.store(dx + base + offsets, out.to(dx.dtype.element_ty), mask=exists)
        if residual_stats is not None:
            more = tl.load(residual + base + offsets, mask=exists, other=0.0).to(tl.float32) - r_first[None, :]
            out = value * r_scale[None, :] + (more * r_slope[None, :] + r_constant[None, :])
            tl.store(d_residual + base + offsets, out.to(d_residual.dtype.element_ty), mask=exists)
