"""The definition against 50 digits, and itself differentiated twice."""

import mpmath
import pytest
import torch
from helpers import OPTIONS, loss_and_gradient, mp_truth, problem, truth

from sre_triton import reference


@pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("K", [2, 7])
def test_every_option_against_mpmath(name, probabilities, K):
    logits, target, options = problem(3, K, OPTIONS[name], probabilities=probabilities, spread=6, dtype=torch.float64)
    loss, parts, gradient = truth(logits, target, **options, reduction="none")
    rows, gradients = mp_truth(logits, target, options)
    torch.testing.assert_close(torch.stack([loss, *parts], 1), rows, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(gradient, gradients, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coin_entropy_over_the_whole_line(dtype):
    t = torch.tensor([-80.0, -30, -16, -1, -1e-3, 0, 1e-3, 1, 16, 30, 80], dtype=dtype)
    with mpmath.workdps(80):
        expected = []
        for value in t.tolist():
            x = mpmath.exp(value)
            a, b = 1 / (1 + x), x / (1 + x)
            expected.append(float(-a * mpmath.log(a) - b * mpmath.log(b)))
    h = reference.coin_entropy(t)
    torch.testing.assert_close(
        h.double(), torch.tensor(expected, dtype=torch.float64), rtol=8 * torch.finfo(dtype).eps, atol=0
    )
    assert reference.coin_entropy(torch.tensor([-torch.inf])).item() == 0


def test_twice_differentiable():
    logits, target, options = problem(2, 5, OPTIONS["all"], dtype=torch.float64)
    leaf = logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: reference.self_regularized_entropy(z, target, **options)[0], leaf)
    assert torch.autograd.gradgradcheck(lambda z: reference.self_regularized_entropy(z, target, **options)[0], leaf)


def test_gradient_to_probabilities_and_their_weight():
    logits, target, options = problem(2, 4, OPTIONS["all"], probabilities=True, dtype=torch.float64)
    weight = options.pop("weight")
    inputs = (logits.requires_grad_(), target.double().requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda *a: reference.self_regularized_entropy(*a, **options)[0], inputs)


def test_source_formula_is_the_same_loss():
    logits, target, _ = problem(8, 20, {}, dtype=torch.float64)
    loss, _, gradient = truth(logits, target)

    def source(leaf, target, return_parts):
        return reference.source_formula(leaf, target), None

    source_loss, _, source_gradient = loss_and_gradient(logits, target, loss=source)
    torch.testing.assert_close(source_loss, loss)
    torch.testing.assert_close(source_gradient, gradient)
