"""The registered ops: PyTorch's own check, and rows that do not know of each other."""

import pytest
import torch
from helpers import OPTIONS, options_of, problem, truth

from sre_triton import backend, primitives

both_targets = pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])


@pytest.fixture
def module(row_backend):
    """A backend's primitives."""
    return backend.primitives(row_backend)


def arguments(module, name, probabilities, dtype=torch.float32):
    logits, target, keywords = problem(6, 20, OPTIONS["all"], probabilities=probabilities, dtype=dtype)
    options = options_of(**keywords)
    weight, scale = keywords["weight"], torch.rand(6)
    _, stats = module.row_loss(logits, target, weight, options)
    given = {
        "row_lse": (weight,),
        "row_sums": (stats[: primitives.NUM_LSE].contiguous(),),
        "row_loss": (weight,),
        "row_gradient": (weight, stats, scale),
        "row_loss_and_gradient": (weight, scale),
    }
    return logits, target, *given[name], *options


def split(given):
    """The arguments of an op as the function takes them."""
    return *given[: -primitives.NUM_OPTIONS], primitives.RowOptions(*given[-primitives.NUM_OPTIONS :])


@both_targets
@pytest.mark.parametrize("name", primitives.PRIMITIVES)
def test_opcheck(name, probabilities, module):
    torch.library.opcheck(getattr(module, name).op, arguments(module, name, probabilities))


@pytest.mark.parametrize("name", primitives.PRIMITIVES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_fakes_have_the_shapes_and_dtypes_of_the_results(name, dtype, module):
    if (dtype, module) == (torch.float64, backend.primitives("triton")):
        pytest.skip("refused")
    given = arguments(module, name, False, dtype)
    real = getattr(module, name).op(*given)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        *tensors, options = split([mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in given])
        fake = getattr(module, name)(*tensors, options)
    for ours, theirs in zip(*((o,) if isinstance(o, torch.Tensor) else o for o in (real, fake)), strict=True):
        assert (ours.shape, ours.dtype, ours.stride()) == (theirs.shape, theirs.dtype, theirs.stride())


@both_targets
@pytest.mark.parametrize("K", [30, 9000])
def test_primitives_compose(K, probabilities, module):
    logits, target, keywords = problem(9, K, OPTIONS["all"], probabilities=probabilities)
    weight, options = keywords["weight"], options_of(**keywords)
    scale = torch.rand(9)
    lse = module.row_lse(logits, target, weight, options)
    sums = module.row_sums(logits, target, lse, options)
    losses, stats = module.row_loss(logits, target, weight, options)
    torch.testing.assert_close(torch.cat([lse, sums]), stats)
    gradient = module.row_gradient(logits, target, weight, stats, scale, options)
    fused_losses, fused_gradient = module.row_loss_and_gradient(logits, target, weight, scale, options)
    torch.testing.assert_close(fused_losses, losses)
    torch.testing.assert_close(fused_gradient, gradient)


@pytest.mark.parametrize("K", [10, 300])
def test_ignored_rows_have_no_statistics(K, on_triton):
    kernels = backend.primitives(on_triton)
    logits, target, _ = problem(9, K, {})
    target[::2], logits[0], logits[2], logits[4] = -100, torch.nan, -torch.inf, torch.inf
    options = options_of()
    losses, stats = kernels.row_loss(logits, target, None, options)
    lse = kernels.row_lse(logits, target, None, options)
    sums = kernels.row_sums(logits, target, stats[:5], options)
    assert (stats[0, 1::2] != 0).all()
    for found in (losses, stats, lse, sums):
        assert (found[:, ::2] == 0).all()


@both_targets
def test_backends_agree_on_the_statistics(probabilities, on_triton, uncompiled):
    logits, target, keywords = problem(9, 30, OPTIONS["all"], probabilities=probabilities)
    given = (logits, target, keywords["weight"], options_of(**keywords))
    for ours, theirs in zip(
        backend.primitives("triton").row_loss(*given), backend.primitives("compile").row_loss(*given), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@both_targets
@pytest.mark.parametrize("options", ["default", "weight+smoothing", "all"])
def test_shards_combine_by_maximum_and_sum(options, probabilities, module):
    logits, target, keywords = problem(9, 60, OPTIONS[options], probabilities=probabilities)
    weight, scale = keywords.get("weight"), torch.rand(9)
    whole = logits, target, weight, options_of(**keywords)
    _, stats = module.row_loss(*whole)
    m = stats[0]
    shards, lse = [(0, 23), (23, 60)], torch.zeros(5, 9)
    for start, stop in shards:
        part = slice(start, stop)
        given = logits[:, part], target[:, part] if probabilities else target, None if weight is None else weight[part]
        of_shard = module.row_lse(*given, options_of(**keywords)._replace(first_class=start, all_classes=60))
        shift = of_shard[0] - m
        of_shard[1] *= shift.exp()
        of_shard[3] += of_shard[2] * shift
        lse += of_shard
    lse[0] = m
    if probabilities and weight is None:
        lse[4] = 1
    torch.testing.assert_close(lse, stats[:5])
    sums = 0
    for start, stop in shards:
        part = slice(start, stop)
        given = logits[:, part], target[:, part] if probabilities else target
        sums += module.row_sums(*given, lse, options_of(**keywords)._replace(first_class=start, all_classes=60))
    torch.testing.assert_close(sums, stats[5:])
    gradient = []
    for start, stop in shards:
        part = slice(start, stop)
        given = logits[:, part], target[:, part] if probabilities else target, None if weight is None else weight[part]
        gradient.append(
            module.row_gradient(
                *given, stats, scale, options_of(**keywords)._replace(first_class=start, all_classes=60)
            )
        )
    expected = module.row_gradient(logits, target, weight, stats, scale, options_of(**keywords))
    torch.testing.assert_close(torch.cat(gradient, 1), expected)


@both_targets
@pytest.mark.parametrize("name", ["row_loss", "row_loss_and_gradient"])
def test_formula(name, probabilities, module):
    op, (logits, target, *rest) = getattr(module, name).op, arguments(module, name, probabilities)
    logits.requires_grad_()
    losses, second = op(logits, target, *rest)
    upstream = torch.linspace(-1, 2, 6)
    # Through the parts, which are the other losses, no gradient flows.
    (gradient,) = torch.autograd.grad((upstream * losses[0]).sum() + losses[1:].sum(), logits, create_graph=True)
    _, _, keywords = problem(6, 20, OPTIONS["all"], probabilities=probabilities)
    keywords |= {"class_mean": False, "reduction": "none"}
    expected = truth(logits.detach(), target, upstream=upstream.double(), **keywords)[2]
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-6)
    for output in (gradient, second):
        if output.requires_grad:
            with pytest.raises(RuntimeError, match="backend='eager'"):
                torch.autograd.grad(output.sum(), logits, retain_graph=True)
    assert gradient.requires_grad
    assert second.requires_grad == (name == "row_loss_and_gradient")


@both_targets
@pytest.mark.parametrize("name", primitives.PRIMITIVES)
@pytest.mark.parametrize("batched", ["rows", "weight", "logits only"])
def test_batching_rule(name, batched, probabilities, module):
    def function(*args):
        return getattr(module, name)(*split(args))

    logits, target, *rest = arguments(module, name, probabilities)
    logits = torch.stack([logits, logits * 2, logits - 1], 1)
    in_dims = [1, None, *[None] * len(rest)]
    if batched == "rows":
        target = torch.stack([target, target.flip(0), target.roll(1, 0)])
        in_dims[1] = 0
    if batched == "weight" and name != "row_sums":
        rest[0] = torch.stack([rest[0], rest[0] + 1, rest[0] + 2])
        in_dims[2] = 0
    together = torch.vmap(function, in_dims=tuple(in_dims))(logits, target, *rest)
    for i in range(3):
        call = [logits[:, i], target[i] if in_dims[1] == 0 else target, *rest]
        if in_dims[2] == 0:
            call[2] = rest[0][i]
        alone = function(*call)
        for one, many in zip(*((o,) if isinstance(o, torch.Tensor) else o for o in (alone, together)), strict=True):
            torch.testing.assert_close(many[i], one)


def test_plain_calls_do_not_pass_the_dispatcher(module, monkeypatch):
    given = arguments(module, "row_lse", False)
    monkeypatch.setattr(torch._library.custom_ops.CustomOpDef, "__call__", lambda *_: pytest.fail("dispatched"))
    module.row_lse(*split(given))
