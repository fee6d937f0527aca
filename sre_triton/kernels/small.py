"""The small kernels of a step, each one launch: what the mean divides by, the mean, and the upstream gradient."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows", "ignore_index"])
def inverse_count_kernel(
    target_ptr, weight_ptr, factor_ptr, num_rows, num_classes, ignore_index, BLOCK: tl.constexpr
):  # fmt: skip
    """1 / the number of rows that are not ignored, or the sum of their targets' weights; one program."""
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
    """The sum of a number of each row, times a factor; one program."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        total += tl.load(losses_ptr + row, mask=row < num_rows, other=0.0)
    tl.store(sum_ptr, tl.sum(total, 0) * tl.load(factor_ptr))


@triton.jit(do_not_specialize=["num_rows", "num_programs"])
def scale_gradient_kernel(
    gradient_ptr, gradient_stride, factor_ptr, factor_stride, num_rows, num_classes, num_programs,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Multiply the rows of a stored gradient; factors of 1 are seen here, and cost neither traffic nor a wait."""
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
