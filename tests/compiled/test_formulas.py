"""Digits that the mathematics of a class must not lose; the rest of it is tested through the loss."""

import mpmath
import pytest
import torch

from sre_triton.compiled import formulas


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_minus_log1p_over_keeps_its_digits(dtype):
    mu = torch.cat([torch.logspace(-30, -0.302, 10000, dtype=dtype), torch.linspace(0, 0.5, 10000, dtype=dtype)])
    with mpmath.workdps(40):
        expected = [float(-mpmath.log1p(-mpmath.mpf(value)) / value) if value else 1.0 for value in mu.tolist()]
    computed = formulas.minus_log1p_over(mu).double()
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(computed, expected, rtol=4 * torch.finfo(dtype).eps, atol=0)
