"""Digits that the passes must not lose; the rest of them is tested through the loss."""

import mpmath
import pytest
import torch

from sre_triton import passes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_minus_log1p_over_keeps_its_digits(dtype):
    mu = torch.cat([torch.logspace(-30, -0.302, 10000, dtype=dtype), torch.linspace(0, 0.5, 10000, dtype=dtype)])
    with mpmath.workdps(40):
        expected = [float(-mpmath.log1p(-mpmath.mpf(value)) / value) if value else 1.0 for value in mu.tolist()]
    computed = passes.minus_log1p_over(mu).double()
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(computed, expected, rtol=4 * torch.finfo(dtype).eps, atol=0)


def test_float32_sums_of_short_rows_keep_their_digits():
    # The worst that there is: in each lane of the vectors one number, and beside it those that it swallows.
    x = torch.full((2, passes.SHORT), 2.0**-25)
    x[:, : passes.WIDTH] = 1.0
    summed = torch.compile(passes._sum, dynamic=True)(x).double()
    torch.testing.assert_close(summed, x.double().sum(1, keepdim=True).expand_as(summed), rtol=2e-6, atol=0)
