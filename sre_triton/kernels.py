"""The Triton kernels: programs that walk over the classes of their rows.

Where a row fits into registers it is read once, as a few tiles, and everything from its maximum to its gradient is
computed there (RESIDENT). A longer row is walked in steps of a few tiles, three times: for the sum of exponentials, for
S and U, for the gradient; the second and third reads are for the cache to serve. The three walks are kernels of their
own as well. A program may be a cluster of thread blocks, which hold the tiles of a row together: the code is the same.

Rows that do not begin at multiples of 16 bytes are read in a window that does, and the few classes before and after
it, the edges, as a tile of their own (WINDOW).

The gradient at the target is computed from the row's numbers, and written over what its tile left there. The thread that
wrote the tile does it, so that no barrier is needed: for a cluster there is none but those of its reductions, and
programs that go from row to row while the next row is on its way cannot afford one.

Ignored rows are not read. Where rows of few classes share a program, they are under a mask of nothing, and their
numbers come out as 0 whatever the memory holds.
"""

import triton
import triton.language as tl

from .rows import (
    coefficients_of,
    load_if_counted,
    losses_of,
    lse_with_targets,
    numbers_of,
    shares,
    stats_of,
    sums_with_targets,
    zeros,
)
from .tiles import (
    INF,
    add_to_lse,
    coin_h_and_u,
    column,
    columns,
    exp2_near_0,
    finite_maximum,
    gradient_of,
    largest_of_row,
    load_logits,
    lse_of_edge,
    lse_of_rows,
    maximum_of,
    reference_of,
    sum_of_exps,
    sum_of_row,
    sum_pairs,
    sums_of_h_and_u,
    sums_of_y,
    weighted_sums_of_h_and_u,
)

# ---------------------------------------------------------------------------------------------------------------------
# Rows and tiles


@triton.jit
def _program_rows(inputs, V: tl.constexpr):
    """The program's rows, and which of them there are: None for all."""
    program = tl.program_id(0).to(tl.int64)
    if V.ROWS == 1:
        return program, None
    else:
        rows = program * V.ROWS + tl.arange(0, V.ROWS)
        return rows, rows < inputs.num_rows


@triton.jit
def _adjacent(V: tl.constexpr):
    """The logarithm of the number of adjacent classes that a thread reads at once."""
    ALIGN: tl.constexpr = V.VECTOR if V.WINDOW else V.ALIGN
    if ALIGN == 8:
        return 3
    elif ALIGN == 4:
        return 2
    elif ALIGN == 2:
        return 1
    else:
        return 0


@triton.jit
def _counted(inputs, opts, rows, inside, V: tl.constexpr):
    """The targets, if they are class indices, and which of the rows are there and not ignored."""
    if V.PROBABILITIES:
        return rows, inside
    else:
        target = load_if_counted(inputs.target_ptr + rows, inside)
        if inside is None:
            return target, target != opts.ignore_index
        else:
            return target, inside & (target != opts.ignore_index)


@triton.jit
def _any(counted, V: tl.constexpr):
    """Whether a program has anything to read: a program of one row, one that is counted; else it is masked."""
    if V.ROWS == 1 and not V.PROBABILITIES:
        return counted
    else:
        return True


@triton.jit
def _targets(inputs, opts, rows, target, counted, V: tl.constexpr):
    """Of class indices: the target, or 0 if it is out of range, and there z and w (NaN if out of range)."""
    if V.PROBABILITIES:
        return rows, 0.0, 1.0
    else:
        in_range = target.to(tl.uint64) < inputs.num_classes * V.ALIGN
        g = tl.where(in_range, target, 0)
        z_g = load_logits(inputs.logits_ptr + rows * inputs.logits_stride * V.ALIGN + g, counted, opts.softcap)
        w_g = tl.where(in_range, 1.0, float("nan"))
        if inputs.weight_ptr is not None:
            w_g *= load_if_counted(inputs.weight_ptr + g, counted).to(tl.float32)
        if V.STAGES == 0:
            # Where the gradient takes the place of the logits, other threads are about to write where z_g was read.
            tl.debug_barrier()
        return g, z_g, w_g


@triton.jit
def _window(inputs, rows, V: tl.constexpr):
    """Where the tiles of a row begin, in elements from the pointer, the class there, and the number of classes."""
    begin = rows * inputs.logits_stride * V.ALIGN
    K = inputs.num_classes * V.ALIGN
    if V.WINDOW:
        first = (begin + (V.VECTOR - 1)) // V.VECTOR * V.VECTOR
        return first, (first - begin).to(tl.int32), ((begin + K) // V.VECTOR * V.VECTOR - first).to(tl.int32)
    else:
        return begin, 0, K


@triton.jit
def _tile(WIDTH: tl.constexpr, value: tl.constexpr, V: tl.constexpr):
    """A tile of the rows full of one value."""
    if V.ROWS == 1:
        return tl.full((WIDTH,), value, tl.float32)
    else:
        return tl.full((V.ROWS, WIDTH), value, tl.float32)


@triton.jit
def _place(inputs, rows, counted, window, start, MASKED: tl.constexpr, V: tl.constexpr):
    """Of the tile that begins ``start`` into the window: its elements, classes, and which of them there are."""
    first, head, length = window
    cols = start + tl.arange(0, V.BLOCK_K)
    if V.ROWS > 1:
        cols = cols[None, :]
        mask = (cols < length) & (rows < inputs.num_rows)[:, None]
        return first[:, None] + cols, cols, mask, mask & counted[:, None]
    elif MASKED:
        return first + cols, head + cols, cols < length, cols < length
    else:
        return first + cols, head + cols, None, None


@triton.jit
def _edge(inputs, rows, window, V: tl.constexpr):
    """The same of the edges: a tile of one class per group, those before the window and those behind it."""
    _, head, length = window
    i = tl.arange(0, V.BLOCK_K // 8)
    # Backwards, or Triton would see neighbours, and give all of them to a few threads.
    before, behind = head - 1 - i, inputs.num_classes * V.ALIGN - 1 - (i - V.VECTOR)
    classes = tl.where(i < V.VECTOR, before, behind)
    mask = tl.where(i < V.VECTOR, before >= 0, behind >= head + length)
    return rows * inputs.logits_stride * V.ALIGN + classes, classes, mask, mask


@triton.jit
def _load(inputs, opts, rows, place, V: tl.constexpr):
    """z, and if HAS_Y y, w y, and w y before smoothing (else z again, for nobody); -inf and 0 where there is nothing or the row is not counted."""
    offsets, classes, inside, mask = place
    z = load_logits(inputs.logits_ptr + offsets, mask, opts.softcap)
    if V.HAS_Y:
        share, at_target = shares(inputs, opts, V)
        if V.PROBABILITIES:
            pointers = inputs.target_ptr + column(rows * inputs.target_stride * V.ALIGN, z) + classes
            if mask is None:
                given = tl.load(pointers).to(tl.float32)
            else:
                given = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
            y = given
            if opts.label_smoothing is not None:
                y = share + at_target * given
        else:
            y = tl.zeros_like(z) + share
            given = y
        if mask is not None:
            y = tl.where(mask, y, 0.0)
        wy = y
        if inputs.weight_ptr is not None:
            exists = (classes >= 0) & (classes < inputs.num_classes * V.ALIGN)
            w = tl.load(inputs.weight_ptr + classes, mask=exists, other=0.0)
            wy, given = w.to(tl.float32) * y, w.to(tl.float32) * given
        return z, y, wy, given
    else:
        return z, z, z, z


@triton.jit
def _load_tiles(inputs, opts, rows, counted, window, start, FULL: tl.constexpr, V: tl.constexpr):
    """The four of `_load`, each of TILES tiles, the first FULL of which end before the row does."""
    z, y, wy, given = (), (), (), ()
    for i in tl.static_range(V.TILES):
        place = _place(inputs, rows, counted, window, start + i * V.BLOCK_K, i >= FULL, V)
        z_i, y_i, wy_i, given_i = _load(inputs, opts, rows, place, V)
        z, y, wy, given = z + (z_i,), y + (y_i,), wy + (wy_i,), given + (given_i,)
    return z, y, wy, given


@triton.jit
def _load_edge(inputs, opts, rows, window, V: tl.constexpr):
    """The four of `_load`, or None."""
    if V.WINDOW:
        return _load(inputs, opts, rows, _edge(inputs, rows, window, V), V)
    else:
        return None


@triton.jit
def _sums_of_tiles(tiles, numbers, V: tl.constexpr):
    """In bits, of the groups: for probabilities of (1 - y) h and (1 - y) u, else of h and u of all classes alike."""
    z, y, _, _ = tiles
    if V.PROBABILITIES:
        return weighted_sums_of_h_and_u(z, y, columns(numbers, z[0]), _adjacent(V), V.CTAS, V.PTX)
    else:
        return sums_of_h_and_u(z, columns(numbers, z[0]), _adjacent(V), V.CTAS, V.PTX)


@triton.jit
def _sums_of_rows(h_sum, u_sum, edge, numbers, V: tl.constexpr):
    """The same of rows, from their groups."""
    if V.WINDOW:
        z, y, _, _ = edge
        h, u = coin_h_and_u(z, columns(numbers, z), V.PTX)
        if V.PROBABILITIES:
            h, u = (1.0 - y) * h, (1.0 - y) * u
        h_sum, u_sum = h_sum + h, u_sum + u
    return sum_pairs(h_sum, u_sum)


@triton.jit
def _gradient_of_tile(inputs, opts, z, y, wy, numbers, coefficients, V: tl.constexpr):
    coef_e, coef_u, scale = coefficients
    if V.PROBABILITIES:
        coef_u = column(coef_u, z) * (1.0 - y)
    else:
        share, _ = shares(inputs, opts, V)
        coef_u = column(coef_u * (1.0 - share), z)
    return gradient_of(
        z, wy, columns(numbers, z), column(coef_e, z), coef_u, column(scale, z), opts.softcap, V.HAS_Y, V.PTX
    )


@triton.jit
def _store_gradient(gradient_ptr, gradient_stride, rows, place, gradient, mask, V: tl.constexpr):
    offsets, classes, _, _ = place
    if not V.WINDOW:
        offsets = column(rows * gradient_stride * V.ALIGN, gradient) + classes
    if mask is None:
        tl.store(gradient_ptr + offsets, gradient)
    else:
        tl.store(gradient_ptr + offsets, gradient, mask=mask)


@triton.jit
def _store_gradient_of_tiles(
    inputs, opts, gradient_ptr, gradient_stride, rows, counted, window, start, tiles, numbers, coefficients,
    FULL: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    z, y, wy, _ = tiles
    for i in tl.static_range(V.TILES):
        place = _place(inputs, rows, counted, window, start + i * V.BLOCK_K, i >= FULL, V)
        gradient = _gradient_of_tile(inputs, opts, z[i], y[i], wy[i], numbers, coefficients, V)
        _store_gradient(gradient_ptr, gradient_stride, rows, place, gradient, place[2], V)


@triton.jit
def _store_gradient_of_rest(
    inputs, opts, gradient_ptr, gradient_stride, rows, counted, window, edge, targets, numbers, coefficients,
    V: tl.constexpr,
):  # fmt: skip
    """After the tiles: that of the edges and of the targets."""
    if not V.PROBABILITIES:
        g, z_g, w_g = targets
        coef_e, coef_u, scale = coefficients
        share, at_target = shares(inputs, opts, V)
        y_g = share + at_target
        gradient_g = gradient_of(
            z_g, w_g * y_g, numbers, coef_e, coef_u * (1.0 - y_g), scale, opts.softcap, True, V.PTX
        )
        # The whole tile that holds the target is stored once more, under a mask: its elements lie with the same threads
        # as before, so that the second of two writes is the one that stays.
        if V.ROWS == 1:
            col = g.to(tl.int32) - window[1]
            place = _place(inputs, rows, counted, window, col // V.BLOCK_K * V.BLOCK_K, True, V)
            if V.WINDOW:
                g_or_none = tl.where(col < window[2], g.to(tl.int32), -1)
            else:
                g_or_none = g.to(tl.int32)
            mask = place[1] == g_or_none
        else:
            place = _place(inputs, rows, counted, window, 0, True, V)
            mask = place[3] & (place[1] == g.to(tl.int32)[:, None])
        gradient_g = gradient_g.to(gradient_ptr.dtype.element_ty)
        gradient, _ = tl.broadcast(column(gradient_g, place[1]), place[1])
        _store_gradient(gradient_ptr, gradient_stride, rows, place, gradient, mask, V)
    if V.WINDOW:
        z, y, wy, _ = edge
        place = _edge(inputs, rows, window, V)
        gradient = _gradient_of_tile(inputs, opts, z, y, wy, numbers, coefficients, V)
        if not V.PROBABILITIES:
            gradient = tl.where(place[1] == g, gradient_g, gradient)
        _store_gradient(gradient_ptr, gradient_stride, rows, place, gradient, place[2], V)


@triton.jit
def _store_no_gradient(inputs, gradient_ptr, gradient_stride, rows, counted, V: tl.constexpr):
    """Zeros, of rows that are not counted."""
    window = _window(inputs, rows, V)
    for start in range(0, inputs.num_classes * V.ALIGN, V.BLOCK_K):
        place = _place(inputs, rows, counted, window, start, True, V)
        _store_gradient(gradient_ptr, gradient_stride, rows, place, _tile(V.BLOCK_K, 0.0, V), place[2], V)
    if V.WINDOW:
        place = _edge(inputs, rows, window, V)
        _store_gradient(gradient_ptr, gradient_stride, rows, place, _tile(V.BLOCK_K // 8, 0.0, V), place[2], V)


@triton.jit
def _store_rows(ptr, inputs, rows, numbers, FIRST: tl.constexpr, V: tl.constexpr):
    """Numbers of the rows into a matrix (count, N), from its row FIRST on."""
    N = tl.cast(inputs.num_rows, tl.int64)
    for i in tl.static_range(len(numbers)):
        if V.ROWS == 1:
            tl.store(ptr + (FIRST + i) * N + rows, numbers[i])
        else:
            tl.store(ptr + (FIRST + i) * N + rows, numbers[i], mask=rows < N)


@triton.jit
def _load_rows(ptr, inputs, rows, i, inside):
    N = tl.cast(inputs.num_rows, tl.int64)
    return load_if_counted(ptr + i * N + rows, inside)


# ---------------------------------------------------------------------------------------------------------------------
# The walks over the tiles of a row. `edge` is what `_load_edge` returns.


@triton.jit
def _lse_of_tiles(tiles, edge, V: tl.constexpr):
    """m, s and the sums with y of rows that are held as tiles, and the reference of s."""
    ADJACENT: tl.constexpr = _adjacent(V)
    z, _, wy, given = tiles
    edge_z = None
    if V.WINDOW:
        edge_z = edge[0]
    m = maximum_of(z, edge_z, ADJACENT, V.CTAS)
    reference = reference_of(m, V.PTX)
    exp_sum = sum_of_exps(z, edge_z, reference, ADJACENT, V.CTAS)
    if V.HAS_Y:
        finite = column(finite_maximum(m), z[0])
        y_sum, yz_sum, omega = sums_of_y(z, wy, given, finite, ADJACENT, V.CTAS)
        if V.WINDOW:
            _, _, edge_y, edge_yz, edge_omega = lse_of_edge(edge[0], edge[2], edge[3], True)
            edge_yz += edge_y * (finite_maximum(edge[0]) - finite)
            y_sum, yz_sum, omega = y_sum + edge_y, yz_sum + edge_yz, omega + edge_omega
        return (m, exp_sum, sum_of_row(y_sum), sum_of_row(yz_sum), sum_of_row(omega)), reference
    else:
        return (m, exp_sum, zeros(V), zeros(V), zeros(V)), reference


@triton.jit
def _last_step(inputs, V: tl.constexpr):
    """Where the last step of a walk begins; before it there are only full tiles."""
    shortest = inputs.num_classes * V.ALIGN
    if V.WINDOW:
        shortest -= 2 * (V.VECTOR - 1)
    if V.ROWS > 1:
        return 0
    else:
        return (shortest - 1) // (V.TILES * V.BLOCK_K) * (V.TILES * V.BLOCK_K)


@triton.jit
def _walk_lse(inputs, opts, rows, counted, window, edge, V: tl.constexpr):
    """What `_lse_of_tiles` returns, of rows in memory."""
    ADJACENT: tl.constexpr = _adjacent(V)
    if V.WINDOW:
        lse = lse_of_edge(edge[0], edge[2], edge[3], V.HAS_Y)
    else:
        none, zero = _tile(V.BLOCK_K // 8, -INF, V), _tile(V.BLOCK_K // 8, 0.0, V)
        # Triton 3.6 and 3.8 rewrite a sum in a loop that begins at a constant, and fail if it is used twice afterwards.
        zero += tl.program_id(0).to(tl.float32) * 0.0
        lse = none, zero, zero, zero, zero
    last = _last_step(inputs, V)
    for start in range(0, last, V.TILES * V.BLOCK_K):
        z, _, wy, given = _load_tiles(inputs, opts, rows, counted, window, start, V.TILES, V)
        lse = add_to_lse(lse, z, wy, given, V.HAS_Y, ADJACENT)
    z, _, wy, given = _load_tiles(inputs, opts, rows, counted, window, last, 0, V)
    lse = add_to_lse(lse, z, wy, given, V.HAS_Y, ADJACENT)
    m = largest_of_row(lse[0])
    reference = reference_of(m, V.PTX)
    return lse_of_rows(lse, reference, m, zeros(V), V.HAS_Y), reference


@triton.jit
def _walk_sums(inputs, opts, rows, counted, window, edge, numbers, V: tl.constexpr):
    """Σ h and Σ u as `_sums_of_rows` has them, of rows in memory."""
    last = _last_step(inputs, V)
    h_sum, u_sum = _sums_of_tiles(
        _load_tiles(inputs, opts, rows, counted, window, last, 0, V), numbers, V
    )
    for start in range(0, last, V.TILES * V.BLOCK_K):
        tiles = _load_tiles(inputs, opts, rows, counted, window, start, V.TILES, V)
        h, u = _sums_of_tiles(tiles, numbers, V)
        h_sum += h
        u_sum += u
    return _sums_of_rows(h_sum, u_sum, edge, numbers, V)


@triton.jit
def _walk_gradient(
    inputs, opts, gradient_ptr, gradient_stride, rows, counted, window, numbers, coefficients, V: tl.constexpr
):  # fmt: skip
    last = _last_step(inputs, V)
    for start in range(0, last, V.TILES * V.BLOCK_K):
        tiles = _load_tiles(inputs, opts, rows, counted, window, start, V.TILES, V)
        _store_gradient_of_tiles(
            inputs, opts, gradient_ptr, gradient_stride, rows, counted, window, start, tiles, numbers, coefficients,
            V.TILES, V,
        )  # fmt: skip
    tiles = _load_tiles(inputs, opts, rows, counted, window, last, 0, V)
    _store_gradient_of_tiles(
        inputs, opts, gradient_ptr, gradient_stride, rows, counted, window, last, tiles, numbers, coefficients, 0, V
    )


# ---------------------------------------------------------------------------------------------------------------------
# The kernels


@triton.jit
def _rows_of_row_loss(
    inputs, opts, scale_ptr, scale_stride, losses_ptr, stats_ptr, gradient_ptr, gradient_stride, rows, counted, target,
    tiles, V: tl.constexpr,
):  # fmt: skip
    targets = _targets(inputs, opts, rows, target, counted, V)
    window = _window(inputs, rows, V)
    edge = _load_edge(inputs, opts, rows, window, V)
    if V.RESIDENT:
        if tiles is None:
            tiles = _load_tiles(inputs, opts, rows, counted, window, 0, V.FULL, V)
        lse, reference = _lse_of_tiles(tiles, edge, V)
    else:
        lse, reference = _walk_lse(inputs, opts, rows, counted, window, edge, V)
    lse = lse_with_targets(inputs, opts, lse, targets, V)
    numbers, exp_sum, log_sum = numbers_of(opts, reference, lse[1], counted, V.PTX)
    if V.RESIDENT:
        h_sum, u_sum = _sums_of_tiles(tiles, numbers, V)
        h_sum, u_sum = _sums_of_rows(h_sum, u_sum, edge, numbers, V)
    else:
        h_sum, u_sum = _walk_sums(inputs, opts, rows, counted, window, edge, numbers, V)
    h_sum, u_sum = sums_with_targets(inputs, opts, h_sum, u_sum, targets, numbers, V)
    _store_rows(losses_ptr, inputs, rows, losses_of(opts, lse, h_sum, log_sum, counted, V), 0, V)
    if stats_ptr is not None:
        _store_rows(stats_ptr, inputs, rows, stats_of(lse, reference), 0, V)
        _store_rows(stats_ptr, inputs, rows, (h_sum, u_sum), 5, V)
    if gradient_ptr is not None:
        coefficients = coefficients_of(
            inputs, opts, scale_ptr, scale_stride, rows, counted, lse, exp_sum, log_sum, u_sum, V.PTX
        )
        if V.RESIDENT:
            _store_gradient_of_tiles(
                inputs, opts, gradient_ptr, gradient_stride, rows, counted, window, 0, tiles, numbers, coefficients,
                V.FULL, V,
            )  # fmt: skip
        else:
            _walk_gradient(
                inputs, opts, gradient_ptr, gradient_stride, rows, counted, window, numbers, coefficients, V
            )
        _store_gradient_of_rest(
            inputs, opts, gradient_ptr, gradient_stride, rows, counted, window, edge, targets, numbers, coefficients, V
        )


@triton.jit
def _row_loss(
    inputs, opts, scale_ptr, scale_stride, losses_ptr, stats_ptr, gradient_ptr, gradient_stride, rows, inside, tiles,
    V: tl.constexpr,
):  # fmt: skip
    target, counted = _counted(inputs, opts, rows, inside, V)
    if _any(counted, V):
        _rows_of_row_loss(
            inputs, opts, scale_ptr, scale_stride, losses_ptr, stats_ptr, gradient_ptr, gradient_stride, rows,
            None if V.ROWS == 1 else counted, target, tiles, V,
        )  # fmt: skip
    else:
        zero = zeros(V)
        _store_rows(losses_ptr, inputs, rows, (zero, zero, zero, zero), 0, V)
        if stats_ptr is not None:
            _store_rows(stats_ptr, inputs, rows, (zero, zero, zero, zero, zero, zero, zero), 0, V)
        if gradient_ptr is not None:
            _store_no_gradient(inputs, gradient_ptr, gradient_stride, rows, counted, V)


@triton.jit
def row_loss_kernel(
    inputs, opts, scale_ptr, scale_stride, losses_ptr, stats_ptr, gradient_ptr, gradient_stride, num_programs,
    V: tl.constexpr,
):  # fmt: skip
    """row_loss with stats_ptr, row_loss_and_gradient with gradient_ptr."""
    if V.STAGES == 0:
        rows, inside = _program_rows(inputs, V)
        _row_loss(
            inputs, opts, scale_ptr, scale_stride, losses_ptr, stats_ptr, gradient_ptr, gradient_stride, rows, inside,
            None, V,
        )  # fmt: skip
    else:
        for row in tl.range(tl.program_id(0), inputs.num_rows, num_programs, num_stages=V.STAGES):
            rows = tl.cast(row, tl.int64)
            # Of ignored rows as well: which they are is not known when this is read, while the row before is computed.
            tiles = _load_tiles(inputs, opts, rows, None, _window(inputs, rows, V), 0, V.FULL, V)
            _row_loss(
                inputs, opts, scale_ptr, scale_stride, losses_ptr, stats_ptr, gradient_ptr, gradient_stride, rows,
                None, tiles, V,
            )  # fmt: skip


@triton.jit
def row_lse_kernel(inputs, opts, stats_ptr, V: tl.constexpr):
    """The first five statistics."""
    rows, inside = _program_rows(inputs, V)
    target, counted = _counted(inputs, opts, rows, inside, V)
    if _any(counted, V):
        masked = None if V.ROWS == 1 else counted
        targets = _targets(inputs, opts, rows, target, masked, V)
        window = _window(inputs, rows, V)
        edge = _load_edge(inputs, opts, rows, window, V)
        lse, reference = _walk_lse(inputs, opts, rows, masked, window, edge, V)
        stats = stats_of(lse_with_targets(inputs, opts, lse, targets, V), reference)
        _store_rows(stats_ptr, inputs, rows, stats, 0, V)
    else:
        zero = zeros(V)
        _store_rows(stats_ptr, inputs, rows, (zero, zero, zero, zero, zero), 0, V)


@triton.jit
def _numbers_from_stats(inputs, opts, stats_ptr, rows, inside, counted, V: tl.constexpr):
    m, exp_sum = _load_rows(stats_ptr, inputs, rows, 0, inside), _load_rows(stats_ptr, inputs, rows, 1, inside)
    reference = reference_of(m, V.PTX)
    numbers, exp_sum, log_sum = numbers_of(opts, reference, exp_sum * exp2_near_0(reference[2]), counted, V.PTX)
    return m, numbers, exp_sum, log_sum


@triton.jit
def row_sums_kernel(inputs, opts, stats_ptr, sums_ptr, V: tl.constexpr):
    """The last two statistics."""
    rows, inside = _program_rows(inputs, V)
    target, counted = _counted(inputs, opts, rows, inside, V)
    if _any(counted, V):
        masked = None if V.ROWS == 1 else counted
        targets = _targets(inputs, opts, rows, target, masked, V)
        _, numbers, _, _ = _numbers_from_stats(inputs, opts, stats_ptr, rows, inside, masked, V)
        window = _window(inputs, rows, V)
        edge = _load_edge(inputs, opts, rows, window, V)
        h_sum, u_sum = _walk_sums(inputs, opts, rows, masked, window, edge, numbers, V)
        _store_rows(sums_ptr, inputs, rows, sums_with_targets(inputs, opts, h_sum, u_sum, targets, numbers, V), 0, V)
    else:
        _store_rows(sums_ptr, inputs, rows, (zeros(V), zeros(V)), 0, V)


@triton.jit
def row_gradient_kernel(
    inputs, opts, stats_ptr, scale_ptr, scale_stride, gradient_ptr, gradient_stride, V: tl.constexpr
):  # fmt: skip
    """The gradient of scale * loss."""
    rows, inside = _program_rows(inputs, V)
    target, counted = _counted(inputs, opts, rows, inside, V)
    if _any(counted, V):
        masked = None if V.ROWS == 1 else counted
        targets = _targets(inputs, opts, rows, target, masked, V)
        m, numbers, exp_sum, log_sum = _numbers_from_stats(inputs, opts, stats_ptr, rows, inside, masked, V)
        y_sum = _load_rows(stats_ptr, inputs, rows, 2, inside)
        lse = m, exp_sum, y_sum, y_sum, _load_rows(stats_ptr, inputs, rows, 4, inside)
        u_sum = _load_rows(stats_ptr, inputs, rows, 6, inside)
        coefficients = coefficients_of(
            inputs, opts, scale_ptr, scale_stride, rows, masked, lse, exp_sum, log_sum, u_sum, V.PTX
        )
        window = _window(inputs, rows, V)
        edge = _load_edge(inputs, opts, rows, window, V)
        _walk_gradient(inputs, opts, gradient_ptr, gradient_stride, rows, masked, window, numbers, coefficients, V)
        _store_gradient_of_rest(
            inputs, opts, gradient_ptr, gradient_stride, rows, masked, window, edge, targets, numbers, coefficients, V
        )
    else:
        _store_no_gradient(inputs, gradient_ptr, gradient_stride, rows, counted, V)


@triton.jit(do_not_specialize=["num_rows", "num_programs"])
def scale_gradient_kernel(
    gradient_ptr, gradient_stride, factor_ptr, factor_stride, num_rows, num_classes, num_programs,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Multiply the rows of a stored gradient; factors of 1 are seen here, and cost neither traffic nor a wait."""
    K = num_classes * ALIGN
    for first in range(tl.program_id(0) * ROWS, num_rows, num_programs * ROWS):
        rows = tl.cast(first, tl.int64) + tl.arange(0, ROWS)
        factor = tl.load(factor_ptr + rows * factor_stride, mask=rows < num_rows, other=1.0)
        if tl.max((factor != 1.0).to(tl.int32), 0) == 1:
            for start in range(0, K, BLOCK_K):
                cols = (start + tl.arange(0, BLOCK_K))[None, :]
                mask = (rows < num_rows)[:, None] & (cols < K)
                pointers = gradient_ptr + rows[:, None] * gradient_stride * ALIGN + cols
                gradient = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
                tl.store(pointers, factor[:, None] * gradient, mask=mask)
