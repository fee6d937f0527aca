"""Values of rows as columns of 16, so that Inductor makes one loop of a whole pass.

A pass has matrices, (n, K), and values of rows, of which there is one a row. Inductor makes one loop of operations that
all go over a row, one row after another. A tensor (n,) it would compute 16 rows at a time, in a loop of its own, and
the row would leave the cache in between. So in compiled code a value of a row is a tensor (n, WIDTH) whose columns are
all the same:

    the sum of each row     wide                      packed
    row 0:  3.0             3.0 3.0 3.0 ... 3.0       3.0 0.5 7.0 ...
    row 1:  4.0             4.0 4.0 4.0 ... 4.0       4.0 0.1 9.0 ...

``pack`` puts several values beside each other in one such tensor: column 0 has the sums, column 1 another value. What
is packed is returned from the pass, for this reason: Inductor stores what is returned, and computes anything else anew
for every vector of classes that needs it. ``unpack`` takes the values out again, as a sum over the columns: a reduction
gives Inductor one number a row, and no loop over rows.
"""

import torch
from torch import Tensor

WIDTH = 16  # the widest vector of floats that a CPU has
SHORT = 1024  # classes: 64 additions in each lane of that vector, and errors of at most 32 roundings


def wide(value: Tensor) -> Tensor:
    """A value of each row, (n, 1) -> (n, WIDTH)."""
    return value.expand(-1, WIDTH)


def pack(*values: Tensor) -> Tensor:
    """Values of each row beside each other, (n, WIDTH), the first in column 0."""
    column = torch.arange(WIDTH, dtype=values[0].dtype, device=values[0].device)
    packed = values[0]
    for i, value in enumerate(values[1:], 1):
        packed = torch.where(column == i, value, packed)
    return packed


def unpack(packed: Tensor, first: int, count: int) -> tuple[Tensor, ...]:
    """Some values of `pack`, from column `first` on, each (n, 1). A sum of one number and zeros is exact."""
    column = torch.arange(WIDTH, dtype=packed.dtype, device=packed.device)
    return tuple(torch.where(column == first + i, packed, 0).sum(1, keepdim=True) for i in range(count))


def sum_of_classes(x: Tensor) -> Tensor:
    """The sum of each row of x, (n, K) -> (n, WIDTH).

    In float32 a lane of a vector sums K / 16 numbers one after another, and small ones are lost beside large ones:
    5e-6 of a sum of exponentials at K = 131072. Sums in float64 prevent it. Rows of SHORT classes at most do without,
    as float64 would cost them 15 % of a step. (Measured at K = 1000 on 2 cores.)
    """
    dtype = torch.float64 if x.shape[1] > SHORT and x.device.type != "mps" else x.dtype
    return wide(x.sum(1, keepdim=True, dtype=dtype)).to(x.dtype)


def largest_of_classes(z: Tensor) -> Tensor:
    """The maximum of each row of z, (n, K) -> (n, 1).

    A maximum waits for the one before it, and takes long where it keeps NaN. So the maximum is taken of the two halves
    of a row first, class by class, then of the halves of the result; halves may overlap.
    """
    for _ in range(2):
        half = (z.shape[1] + 1) // 2
        z = torch.maximum(z[:, :half], z[:, -half:])
    return z.amax(1, keepdim=True)
