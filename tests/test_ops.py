"""The registered ops: PyTorch's own check, and rows that do not know of each other."""

import pytest
import torch
from helpers import OPTIONS, problem
from test_fallback import options_of

from sre_triton import fallback, ops

both_targets = pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])


def arguments(name, probabilities, dtype=torch.float32):
    logits, target, keywords = problem(6, 20, OPTIONS["all"], probabilities=probabilities, dtype=dtype)
    options = options_of(**keywords)
    weight, scale = keywords["weight"], torch.rand(6)
    _, stats = fallback.row_loss(logits, target, weight, *options)
    given = {
        "row_lse": (weight,),
        "row_sums": (stats[: ops.NUM_LSE].contiguous(),),
        "row_loss": (weight,),
        "row_gradient": (weight, stats, scale),
        "row_loss_and_gradient": (weight, scale),
    }
    return logits, target, *given[name], *options


@both_targets
@pytest.mark.parametrize("name", ops.PRIMITIVES)
def test_opcheck(name, probabilities, uncompiled):
    torch.library.opcheck(getattr(fallback, name).op, arguments(name, probabilities))


@pytest.mark.parametrize("name", ops.PRIMITIVES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_fakes_have_the_shapes_and_dtypes_of_the_results(name, dtype, uncompiled):
    given = arguments(name, False, dtype)
    real = getattr(fallback, name)(*given)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = getattr(fallback, name)(*[mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in given])
    for ours, theirs in zip(*((o,) if isinstance(o, torch.Tensor) else o for o in (real, fake)), strict=True):
        assert (ours.shape, ours.dtype, ours.stride()) == (theirs.shape, theirs.dtype, theirs.stride())


@both_targets
@pytest.mark.parametrize("name", ops.PRIMITIVES)
@pytest.mark.parametrize("batched", ["rows", "weight", "logits only"])
def test_batching_rule(name, batched, probabilities, uncompiled):
    function = getattr(fallback, name)
    logits, target, *rest = arguments(name, probabilities)
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


def test_plain_calls_do_not_pass_the_dispatcher(uncompiled, monkeypatch):
    given = arguments("row_lse", False)
    monkeypatch.setattr(torch._library.custom_ops.CustomOpDef, "__call__", lambda *_: pytest.fail("dispatched"))
    fallback.row_lse(*given)
