"""The numbers: every backend against 50 digits and float64, in easy and in hopeless rows."""

import math

import pytest
import torch
from helpers import OPTIONS, assert_within_bounds, loss_and_gradient, mp_truth, problem, truth
from hypothesis import given, settings
from hypothesis import strategies as st

from sre_triton import reference, self_regularized_entropy
from sre_triton.compiled import inductor

both_targets = pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])


@both_targets
@pytest.mark.parametrize("name", OPTIONS)
def test_options_against_mpmath(name, probabilities, quick_backend):
    logits, target, options = problem(3, 9, OPTIONS[name], probabilities=probabilities, spread=6)
    options["reduction"] = "none"
    loss, parts, gradient = loss_and_gradient(logits, target, backend=quick_backend, **options)
    rows, gradients = mp_truth(logits, target, options)
    torch.testing.assert_close(torch.stack([loss, *parts], 1).double(), rows, rtol=3e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), gradients, rtol=2e-5, atol=1e-6)


@both_targets
@pytest.mark.parametrize("name", ["default", "all"])
def test_compiled_options_against_mpmath(name, probabilities):
    test_options_against_mpmath(name, probabilities, "compile")


@both_targets
@pytest.mark.parametrize("recompute", [False, True], ids=["single pass", "recompute"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_float64_is_float64(reduction, recompute, probabilities, uncompiled):
    logits, target, options = problem(5, 11, OPTIONS["all"], probabilities=probabilities, dtype=torch.float64)
    options |= {"reduction": reduction}
    loss, parts, gradient = loss_and_gradient(logits, target, backend="compile", recompute=recompute, **options)
    true_loss, true_parts, true_gradient = truth(logits, target, **options)
    torch.testing.assert_close(torch.stack([loss, *parts]), torch.stack([true_loss, *true_parts]))
    torch.testing.assert_close(gradient, true_gradient)
    assert loss.dtype == gradient.dtype == torch.float64


@pytest.mark.parametrize("K", [1, 2, 3, 7, 8, 9, 123, 507, 1000, 1823, 5003, 50257])
@pytest.mark.parametrize("spread", [0.1, 3.0, 20.0])
def test_bounds_for_every_number_of_classes(K, spread, backend):
    logits, target, _ = problem(5, K, {}, spread=spread)
    assert_within_bounds(logits, target, backend)


@pytest.mark.parametrize("lead", [-50.0, 10.0, 16.0, 25.0, 29.0, 33.0, 80.0])
@pytest.mark.parametrize("K", [2, 1000])
def test_bounds_where_the_target_leads(lead, K, backend):
    logits, target, _ = problem(4, K, {}, spread=1.0)
    logits[torch.arange(4), target] += lead
    assert_within_bounds(logits, target, backend)


@both_targets
@pytest.mark.parametrize("lead", [20.0, 25.3, 29.1, 30.7, 33.0])
def test_bounds_where_all_wrong_classes_are_equally_far_below_c(lead, probabilities, quick_backend):
    # Every class has the same rounding errors: what would cancel between random classes adds up.
    logits, target = torch.zeros(1, 50257), torch.tensor([7])
    logits[0, 7] = lead
    if probabilities:
        target = torch.nn.functional.one_hot(target, 50257).float()
    assert_within_bounds(logits, target, quick_backend)


@pytest.mark.parametrize("offset", [-1000.0, 1000.0, 1e6])
def test_bounds_at_a_large_offset(offset, backend):
    logits, target, _ = problem(4, 1000, {})
    assert_within_bounds(logits + offset, target, backend)


def test_bounds_where_the_gradient_of_the_regularizer_cancels(backend):
    logits, target, _ = problem(2, 131072, {}, spread=3.0)
    assert_within_bounds(logits, target, backend)


@pytest.mark.parametrize("lead", [-1.0, -0.1, 0.0, 0.1, 1.0])
@pytest.mark.parametrize(("K", "spread"), [(10, 0.5), (1000, 0.05), (1000, 0.5), (5003, 0.2)])
def test_kernels_where_the_loss_wants_to_be(K, spread, lead, on_triton):
    # All wrong classes have about the probability c: U is a sum of many u that cancel; what moves all t alike stays.
    c = 1e-7
    torch.manual_seed(0)
    logits, target = spread * torch.randn(16, K), torch.randint(K, (16,))
    logits.scatter_(1, target[:, None], math.log(1 / c) + lead)
    p = logits.double().softmax(1)
    t = (p / c).log()
    mu = torch.sigmoid(-t.abs())
    slope = (mu * (1 - mu) * (1 - t.abs() * (1 - 2 * mu))).abs().scatter(1, target[:, None], 0).sum(1)
    _, _, gradient = loss_and_gradient(logits, target, reduction="none", class_mean=False, backend=on_triton)
    true_gradient = truth(logits, target, reduction="none", class_mean=False)[2]
    error, norm = (gradient.double() - true_gradient).norm(dim=1), true_gradient.norm(dim=1)
    # What float32's sum of exponentials allows: it is 1 and many 1e-7.
    assert (error <= 5e-6 * norm + 3e-7 + 7e-7 * slope * p.norm(dim=1)).all()


@pytest.mark.parametrize("c", [1e-30, 1e-12, 1e-3, 1.0])
def test_bounds_for_every_c(c, backend):
    logits, target, _ = problem(4, 500, {}, spread=8.0)
    assert_within_bounds(logits, target, backend, c=c)


@pytest.mark.parametrize("c", [1e-30, 1e-12, 1e-8, 1e-7, 1.0])
def test_bounds_of_many_logits_uncompiled(c, uncompiled):
    # So many that exponentials may be powers of 2, of whose exponents a rounding is as large as they are.
    logits, target, _ = problem(64, 1000, {}, spread=20.0)
    assert_within_bounds(logits, target, "compile", c=c)


@both_targets
@pytest.mark.parametrize("recompute", [False, True], ids=["single pass", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradients_are_rounded_once(dtype, recompute, probabilities, row_backend):
    logits, target, options = problem(16, 300, {"class_mean": True}, probabilities=probabilities, dtype=dtype)
    loss, _, gradient = loss_and_gradient(logits, target, recompute=recompute, **options, backend=row_backend)
    wide_loss, _, wide_gradient = loss_and_gradient(logits.float(), target, **options, backend=row_backend)
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    torch.testing.assert_close(loss, wide_loss)
    spacing = torch.nextafter(wide_gradient.to(dtype).abs(), torch.tensor(torch.inf, dtype=dtype)).float()
    spacing = spacing - wide_gradient.to(dtype).abs().float()
    assert ((gradient.float() - wide_gradient).abs() <= 1.01 * spacing).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_compiled_half_precision(dtype):
    logits, target, _ = problem(64, 300, {}, dtype=dtype)
    for recompute in (False, True):
        loss, _, gradient = loss_and_gradient(logits, target, recompute=recompute, backend="compile")
        true_loss, _, true_gradient = truth(logits, target)
        assert abs(loss - true_loss) <= 2e-6 * true_loss.abs() + 3e-7
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient.double(), true_gradient, rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_scale_is_applied_before_rounding(quick_backend):
    # Of 1/65536 of a gradient float16 holds a few bits; times the loss scale, all of its digits.
    logits, target, _ = problem(64, 10, {}, spread=0.1, dtype=torch.float16)
    scale, options = torch.tensor(65536.0), {"denominator": 65536.0}
    _, _, gradient = loss_and_gradient(logits, target, backend=quick_backend, upstream=scale, **options)
    _, _, true_gradient = truth(logits, target, upstream=scale.double(), **options)
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=1e-3, atol=1e-6)
    _, _, gradient = loss_and_gradient(logits, target, backend=quick_backend, denominator=1e-3, recompute=False)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("masked", [1, 500, 999])
def test_masked_classes(masked, backend):
    logits, target, _ = problem(6, 1000, {}, spread=2.0)
    target = target % (1000 - masked)
    logits[:, 1000 - masked :] = -torch.inf
    loss, parts, gradient = loss_and_gradient(logits, target, backend=backend)
    kept_loss, kept_parts, kept_gradient = truth(logits[:, : 1000 - masked], target)
    torch.testing.assert_close(loss.double(), kept_loss, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(parts.regularizer.double(), kept_parts.regularizer, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(gradient[:, : 1000 - masked].double(), kept_gradient, rtol=1e-4, atol=1e-6)
    assert (gradient[:, 1000 - masked :] == 0).all()


def test_masked_class_with_probability_zero(quick_backend):
    logits = torch.tensor([[0.0, 1.0, -torch.inf]])
    target = torch.tensor([[0.25, 0.75, 0.0]])
    loss, _, gradient = loss_and_gradient(logits, target, backend=quick_backend)
    true_loss, _, true_gradient = truth(logits[:, :2], target[:, :2])
    torch.testing.assert_close(loss.double(), true_loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient[:, :2].double(), true_gradient, rtol=1e-5, atol=1e-6)
    assert gradient[0, 2] == 0


def test_masked_class_of_weight_zero_takes_no_part_in_smoothing(quick_backend):
    logits, target, options = problem(3, 13, {"weight": True, "label_smoothing": 0.1})
    target = target % 12
    logits[:, 12] = -torch.inf
    options["weight"][12] = 0
    loss, _, gradient = loss_and_gradient(logits, target, backend=quick_backend, **options)
    logits[:, 12] = -1e3
    true_loss, _, true_gradient = truth(logits, target, **options)
    torch.testing.assert_close(loss.double(), true_loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=1e-5, atol=1e-6)


def test_softcap_makes_masked_classes_finite(quick_backend):
    logits, target, _ = problem(3, 13, {})
    logits[:, 5] = -torch.inf
    target[0] = 5
    capped = logits.clone()
    capped[:, 5] = -1e4
    loss, _, gradient = loss_and_gradient(logits, target, softcap=3.0, backend=quick_backend)
    true_loss, _, true_gradient = truth(capped, target, softcap=3.0)
    torch.testing.assert_close(loss.double(), true_loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=1e-5, atol=1e-6)
    assert (gradient[:, 5] == 0).all()


def test_masked_target_is_infinitely_wrong(backend):
    logits = torch.zeros(2, 4)
    logits[0, 1] = -torch.inf
    loss, parts, gradient = loss_and_gradient(logits, torch.tensor([1, 1]), backend=backend, reduction="none")
    assert loss[0] == torch.inf
    assert parts.cross_entropy[0] == torch.inf
    assert torch.isfinite(loss[1])
    assert torch.isfinite(gradient).all()


@both_targets
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_poison_stays_in_its_row(value, probabilities, backend):
    logits, target, _ = problem(5, 200, {}, probabilities=probabilities)
    logits[2, 17] = value
    loss, parts, gradient = loss_and_gradient(logits, target, backend=backend, reduction="none")
    others = torch.arange(5) != 2
    assert loss[2].isnan()
    assert parts.cross_entropy[2].isnan()
    assert gradient[2].isnan().all()
    true_loss, _, true_gradient = truth(logits[others], target[others], reduction="none")
    torch.testing.assert_close(loss[others].double(), true_loss, rtol=5e-6, atol=1e-6)
    torch.testing.assert_close(gradient[others].double(), true_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("K", [100, 20000])
def test_a_row_of_minus_infinity_is_nan(K, backend):
    logits = torch.full((2, K), -torch.inf)
    logits[1] = 0
    loss, parts, gradient = loss_and_gradient(logits, torch.tensor([3, 3]), backend=backend, reduction="none")
    for numbers in (loss, *parts[:2], gradient[:, 3], gradient[:, 50]):
        assert numbers.isnan().tolist() == [True, False]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("K", [20, 9000])
def test_ignored_rows_under_all_options(K, name, quick_backend):
    logits, target, options = problem(4, K, OPTIONS[name])
    logits[1], target[1] = torch.nan, -100
    kept = torch.tensor([0, 2, 3])
    for recompute in (False, True):
        options |= {"reduction": "sum"}
        loss, _, gradient = loss_and_gradient(logits, target, backend=quick_backend, recompute=recompute, **options)
        true_loss, _, true_gradient = truth(logits[kept], target[kept], **options)
        torch.testing.assert_close(loss.double(), true_loss, rtol=5e-6, atol=1e-6)
        torch.testing.assert_close(gradient[kept].double(), true_gradient, rtol=1e-4, atol=1e-6)
        assert (gradient[1] == 0).all()


@pytest.mark.parametrize("recompute", [False, True], ids=["single pass", "recompute"])
def test_ignored_rows_are_selected_away(recompute, backend):
    logits, target, _ = problem(6, 200, {})
    logits[1], logits[4, 3] = torch.nan, torch.inf
    target[[1, 4]] = -100
    kept = torch.tensor([0, 2, 3, 5])
    loss, parts, gradient = loss_and_gradient(logits, target, backend=backend, recompute=recompute)
    true_loss, true_parts, true_gradient = truth(logits[kept], target[kept])
    torch.testing.assert_close(loss.double(), true_loss, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(torch.stack(parts).double(), torch.stack(true_parts), rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(gradient[kept].double(), true_gradient, rtol=1e-4, atol=1e-6)
    assert (gradient[[1, 4]] == 0).all()


@pytest.mark.parametrize("name", ["default", "label_smoothing", "weight+smoothing", "z_loss"])
def test_gradient_rows_sum_to_zero(name, quick_backend):
    logits, target, options = problem(6, 300, OPTIONS[name])
    _, _, gradient = loss_and_gradient(logits, target, backend=quick_backend, reduction="sum", **options)
    total = gradient.double().sum(1)
    if name == "z_loss":
        lse = logits.double().logsumexp(1)
        total = total - 2 * options["z_loss"] * lse
    assert total.abs().max() <= 3e-6 * gradient.abs().sum(1).max()


def test_shifting_the_logits_changes_nothing(quick_backend):
    logits, target, _ = problem(6, 300, {})
    logits = logits.round(decimals=2)
    logits = (logits * 64).round() / 64  # so that the shift is exact
    loss, _, gradient = loss_and_gradient(logits, target, backend=quick_backend)
    shifted_loss, _, shifted_gradient = loss_and_gradient(logits + 512, target, backend=quick_backend)
    torch.testing.assert_close(shifted_loss, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(shifted_gradient, gradient, rtol=1e-4, atol=1e-8)


def test_permuting_classes_permutes_the_gradient(quick_backend):
    logits, target, options = problem(6, 300, OPTIONS["all"])
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1), device="cpu").to(logits.device)
    loss, _, gradient = loss_and_gradient(logits, target, backend=quick_backend, **options)
    options["weight"] = options["weight"][order]
    moved_loss, _, moved = loss_and_gradient(
        logits[:, order], order.argsort()[target], backend=quick_backend, **options
    )
    torch.testing.assert_close(moved_loss, loss)
    torch.testing.assert_close(moved, gradient[:, order], rtol=1e-4, atol=1e-8)


def test_probabilities_that_do_not_sum_to_one_scale_only_the_cross_entropy(quick_backend):
    logits, target, _ = problem(4, 9, {}, probabilities=True)
    _, parts, _ = loss_and_gradient(logits, target * 0, z_loss=0.1, backend=quick_backend)
    log_p = logits.double().log_softmax(1)
    assert parts.cross_entropy == 0
    expected = reference.coin_entropy(log_p - math.log(1e-7)).sum(1).mean()
    torch.testing.assert_close(parts.regularizer.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts.z_loss.double(), 0.1 * logits.double().logsumexp(1).square().mean())


@pytest.mark.parametrize("epsilon", [0.0, 0.2, 1.0])
def test_label_smoothing_equals_probabilities(epsilon, quick_backend):
    logits, target, _ = problem(6, 30, {})
    smoothed = (1 - epsilon) * torch.nn.functional.one_hot(target, 30).float() + epsilon / 30
    first = loss_and_gradient(logits, target, label_smoothing=epsilon, backend=quick_backend)
    second = loss_and_gradient(logits, smoothed, backend=quick_backend)
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-7)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    N=st.integers(1, 6),
    K=st.integers(1, 60),
    spread=st.sampled_from([0.0, 0.1, 3.0, 30.0]),
    probabilities=st.booleans(),
    weighted=st.booleans(),
    ignored=st.booleans(),
    recompute=st.booleans(),
    reduction=st.sampled_from(["none", "mean", "sum"]),
    options=st.fixed_dictionaries(
        {},
        optional={
            "c": st.sampled_from([1e-12, 1e-3]),
            "reg_weight": st.sampled_from([-1.0, 0.0, 0.5]),
            "class_mean": st.booleans(),
            "label_smoothing": st.sampled_from([0.1, 1.0]),
            "z_loss": st.sampled_from([0.01, 1.0]),
            "softcap": st.sampled_from([2.0, 30.0]),
        },
    ),
)
def test_any_combination(N, K, spread, probabilities, weighted, ignored, recompute, reduction, options):
    logits, target, options = problem(
        N, K, options | {"weight": weighted}, probabilities=probabilities, spread=spread, seed=N * K
    )
    if not weighted:
        del options["weight"]
    if ignored and not probabilities:
        target[::2] = -100
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inductor, "_compiled", {})
        patch.setattr(inductor, "_uncompiled", {"cpu"})
        loss, parts, gradient = loss_and_gradient(
            logits, target, reduction=reduction, recompute=recompute, backend="compile", **options
        )
    true_loss, true_parts, true_gradient = truth(logits, target, reduction=reduction, **options)
    close = {"rtol": 1e-5, "atol": 3e-6 * (1 if reduction != "sum" else N), "equal_nan": True}
    torch.testing.assert_close(torch.stack([loss, *parts]).double(), torch.stack([true_loss, *true_parts]), **close)
    torch.testing.assert_close(gradient.double(), true_gradient, **close | {"rtol": 1e-4})


def test_every_wrong_class_is_pushed_to_c():
    # At p = c for all wrong classes, S is at its maximum, (K - 1) log 2.
    K, c = 11, 1e-7
    logits = torch.full((1, K), c).log()
    logits[0, 3] = torch.tensor(1 - (K - 1) * c).log()
    _, parts = self_regularized_entropy(logits, torch.tensor([3]), return_parts=True)
    torch.testing.assert_close(parts.regularizer, (K - 1) * torch.tensor(2.0).log())
