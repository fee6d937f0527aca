"""Sums over the classes lose no digits; the rest of columns.py and passes.py is tested through the loss."""

import torch

from sre_triton.compiled import columns


def test_float32_sums_of_short_rows_keep_their_digits():
    # The worst that there is: in each lane of the vectors one number, and beside it those that it swallows.
    x = torch.full((2, columns.SHORT), 2.0**-25)
    x[:, : columns.WIDTH] = 1.0
    summed = torch.compile(columns.sum_of_classes, dynamic=True)(x).double()
    torch.testing.assert_close(summed, x.double().sum(1, keepdim=True).expand_as(summed), rtol=2e-6, atol=0)
