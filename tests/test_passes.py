"""Digits that the passes must not lose; the rest of them is tested through the loss."""

import mpmath
import pytest
import torch

from sre_triton import passes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_minus_log1p_keeps_its_digits(dtype):
    # Up to 1 - 1/16, which is what four coins at their worst leave.
    mu = torch.cat([torch.logspace(-30, -0.05, 10000, dtype=dtype), torch.linspace(0, 0.9375, 10000, dtype=dtype)])
    with mpmath.workdps(40):
        expected = torch.tensor(
            [float(-mpmath.log1p(-mpmath.mpf(value))) for value in mu.tolist()], dtype=torch.float64
        )
    computed = passes.minus_log1p(mu).double()
    torch.testing.assert_close(computed, expected, rtol=4 * torch.finfo(dtype).eps, atol=0)
