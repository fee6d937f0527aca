"""Digits that the passes must not lose; the rest of them is tested through the loss."""

import torch

from sre_triton.compiled import passes


def test_float32_sums_of_short_rows_keep_their_digits():
    # The worst that there is: in each lane of the vectors one number, and beside it those that it swallows.
    x = torch.full((2, passes.SHORT), 2.0**-25)
    x[:, : passes.WIDTH] = 1.0
    summed = torch.compile(passes._sum, dynamic=True)(x).double()
    torch.testing.assert_close(summed, x.double().sum(1, keepdim=True).expand_as(summed), rtol=2e-6, atol=0)
