"""What FlopCounterMode counts: for the fused head, the products of a linear layer and of its backward."""

import importlib.util
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import linear_problem
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode

from sre_triton import (
    LinearSelfRegularizedEntropyLoss,
    VocabShard,
    flops,
    linear_self_regularized_entropy,
    self_regularized_entropy,
)

N, D, K = 24, 8, 20


def counted(function, *tensors):
    """In units of N D K, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        loss = function(*tensors).sum()
        if loss.requires_grad:
            loss.backward()
    return counter.get_total_flops() / (N * D * K)


@pytest.mark.parametrize("chunk_rows", [None, 5], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("wanted", [(a, b) for a in (0, 1) for b in (0, 1)], ids=str)
@pytest.mark.parametrize("backend", ["compile", "eager"])
def test_counts_the_products_that_are_done(backend, wanted, reduction, chunk_rows, uncompiled):
    *tensors, target, _ = linear_problem((2, N // 2), D, K, {})
    x, W, b = (
        tensor.detach().requires_grad_(bool(want)) for tensor, want in zip(tensors, (*wanted, wanted[1]), strict=True)
    )

    def fused(x, W, b):
        options = {"reduction": reduction, "chunk_rows": chunk_rows, "backend": backend}
        return linear_self_regularized_entropy(x, W, target, linear_bias=b, **options)

    def plain(x, W, b):
        logits = F.linear(x, W, b).flatten(0, 1)
        return self_regularized_entropy(logits, target.flatten(), reduction=reduction, backend="eager")

    again = 2 * (reduction == "none" and any(wanted) and backend != "eager")
    assert counted(plain, x, W, b) == 2 * (1 + sum(wanted))
    assert counted(fused, x, W, b) == 2 * (1 + sum(wanted)) + again


def test_counting_changes_nothing_of_the_module(uncompiled):
    # The counter's hooks are on all modules, and only watch.
    head, target = LinearSelfRegularizedEntropyLoss(D, K), torch.randint(K, (N,))
    x = torch.randn(N, D, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        head(x, target).backward()
    counts = counter.get_flop_counts()["Global"]
    assert counts == {torch.ops.sre_triton.linear_losses_and_gradients: 6 * N * D * K}


def of_a_shard(group, dtensor):
    shard = VocabShard.even(K, group)
    x, W, _, target, _ = linear_problem((N,), D, K, {})
    W = W.detach()[shard.start : shard.stop].requires_grad_()
    if dtensor:
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import DTensor, Shard

        mesh = DeviceMesh.from_group(group, "cpu")
        W = DTensor.from_local(W, mesh, [Shard(0)], shape=(K, D), stride=(D, 1))
        return counted(lambda x, W: linear_self_regularized_entropy(x, W, target), x, W)
    return counted(lambda x, W: linear_self_regularized_entropy(x, W, target, shard=shard), x, W)


@pytest.mark.parametrize("dtensor", [False, True], ids=["shard", "dtensor"])
def test_counts_the_share_of_a_rank(dtensor, ranks):
    assert ranks.run(3, of_a_shard, dtensor) == [6 * 7 / K, 6 * 7 / K, 6 * 6 / K]


def test_the_formula_waits_for_its_module(monkeypatch):
    op = torch.ops.aten.trace
    monkeypatch.delitem(sys.modules, flops.COUNTER)
    monkeypatch.setattr(torch.utils, "flop_counter", flop_counter)  # which the import changes
    finders = list(sys.meta_path)
    flops.count_flops(op, lambda shape, *, out_shape: 7)
    importlib.util.find_spec(flops.COUNTER)  # by somebody who only looks
    fresh = importlib.import_module(flops.COUNTER)
    assert sys.meta_path == finders
    assert fresh is not flop_counter
    with fresh.FlopCounterMode(display=False) as counter:
        torch.ones(2, 2).trace()
    assert counter.get_total_flops() == 7


def test_the_formula_is_there_at_once_where_the_module_is(monkeypatch):
    op = torch.ops.aten.trace
    monkeypatch.setitem(flop_counter.flop_registry, op, None)
    del flop_counter.flop_registry[op]
    flops.count_flops(op, lambda shape, *, out_shape: shape[0])
    assert counted(lambda z: z.trace(), torch.ones(N * D * K, 2)) == 1
