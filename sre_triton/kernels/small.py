"""The small kernels of a step, each one launch: the factor of the mean, the mean, and the upstream gradient."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows", "ignore_index"])
def inverse_count_kernel(
    target_ptr, weight_ptr, factor_ptr, num_rows, num_classes, ignore_index, BLOCK: tl.constexpr
):  # fmt: skip
    """Write 1 / (the rows that are not ignored), (), or 1 / (the sum of their targets' class weights); one program.

    A mean over rows is a sum times this factor. A target out of range counts as a row, but has no weight. A step's
    loads are all under way at once; the threads, and thread blocks, meet once at the end.
    """
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        target = tl.load(target_ptr + row, mask=row < num_rows, other=0)
        counted = (row < num_rows) & (target != ignore_index)
        if weight_ptr is None:
            total += counted.to(tl.float32)
        else:
            counted = counted & (target >= 0) & (target < num_classes)
            total += tl.load(weight_ptr + target, mask=counted, other=0.0).to(tl.float32)
    tl.store(factor_ptr, tl.fdiv(1.0, tl.sum(total, 0)))


@triton.jit(do_not_specialize=["num_rows"])
def scaled_sum_kernel(losses_ptr, factor_ptr, sum_ptr, num_rows, BLOCK: tl.constexpr):
    """Write the sum of the losses, (N,), times a factor, (); one program, so their order is always the same."""
    factor = tl.load(factor_ptr)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        total += tl.load(losses_ptr + row, mask=row < num_rows, other=0.0)
    tl.store(sum_ptr, tl.sum(total, 0) * factor)


@triton.jit(do_not_specialize=["num_rows", "num_programs"])
def scale_gradient_kernel(
    gradient_ptr, gradient_stride, factor_ptr, factor_stride, num_rows, num_classes, num_programs,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Multiply the rows of a stored gradient, (N, K), by a factor each, (N,), in place.

    `factor_ptr` points to the upstream gradient; `factor_stride` is 0 where all rows have the same factor. It is most
    often 1: a program whose rows have factors of 1 neither reads nor writes its part of the gradient, and the host need
    not wait to know it.
    """
    K = num_classes * ALIGN
    for first in range(tl.program_id(0) * ROWS, num_rows, num_programs * ROWS):
        row = tl.cast(first, tl.int64) + tl.arange(0, ROWS)
        factor = tl.load(factor_ptr + row * factor_stride, mask=row < num_rows, other=1.0)
        if tl.max((factor != 1.0).to(tl.int32), 0) == 1:
            for start in range(0, K, BLOCK_K):
                cols = (start + tl.arange(0, BLOCK_K))[None, :]
                mask = (row < num_rows)[:, None] & (cols < K)
                pointers = gradient_ptr + row[:, None] * gradient_stride * ALIGN + cols
                gradient = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
                tl.store(pointers, factor[:, None] * gradient, mask=mask)
