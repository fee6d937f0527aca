"""Classes sharded over ranks: the numbers of one rank from two collectives, and no plausible number when one fails."""

import copy
import functools
import io
import itertools
import os
import pickle
import re
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from helpers import (
    OPTIONS,
    assert_found_within_bounds,
    assert_linear_within_bounds,
    linear_problem,
    linear_truth,
    loss_and_gradient,
    problem,
    truth,
)
from ranks import spawn

from sre_triton import (
    LinearSelfRegularizedEntropyLoss,
    SelfRegularizedEntropyLoss,
    VocabShard,
    linear_self_regularized_entropy,
    messages,
    self_regularized_entropy,
)
from sre_triton.sharding import collectives

sys.path.append(str(Path(__file__).parents[2] / "perf"))
from sweep_shards import collectives_of

N, K, D = 9, 60, 16
# The classes of each rank: even, uneven, none at all, in any order.
SPLITS = {
    "1": ((0, 60),),
    "2": ((0, 30), (30, 60)),
    "2, uneven": ((37, 60), (0, 37)),
    "3, one empty": ((20, 60), (20, 20), (0, 20)),
    "4": ((0, 1), (1, 24), (24, 59), (59, 60)),
}
splits = pytest.mark.parametrize("ends", SPLITS.values(), ids=SPLITS)
both_targets = pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])


def of_shard(tensor, shard, dim):
    """A rank's classes."""
    return tensor.narrow(dim, shard.start, shard.stop - shard.start)


def joined(shards, ends, dim):
    """The tensor of all classes from those of the ranks."""
    in_order = sorted(zip(ends, shards, strict=True), key=lambda pair: pair[0])
    return torch.cat([part for _, part in in_order], dim)


def on_rank(group, ends, logits, target, options, upstream=None):
    """Loss, parts and the gradient of this rank's logits."""
    shard = VocabShard(*ends[group.rank()], logits.shape[min(1, logits.dim() - 1)], group)
    tensors = [tensor.to(torch.get_default_device()) for tensor in (logits, target)]
    options = {name: value.to(tensors[0].device) if name == "weight" else value for name, value in options.items()}
    upstream = None if upstream is None else upstream.to(tensors[0].device)
    dim = min(1, logits.dim() - 1)

    def loss(leaf, *args, **keywords):  # of what is no leaf, for the sake of inplace
        return self_regularized_entropy(leaf * 1, *args, **keywords)

    given = of_shard(tensors[0], shard, dim), tensors[1]
    return loss_and_gradient(*given, upstream=upstream, loss=loss, shard=shard, **options)


def assert_is_of_one_rank(ranks, ends, logits, target, options, *, upstream=None, **how):
    """All ranks return one loss, and it and the gradients are the truth."""
    answers = ranks.run(len(ends), on_rank, ends, logits, target, options | how, upstream)
    losses, parts, gradients = zip(*answers, strict=True)
    for loss, some in zip(losses, parts, strict=True):
        assert torch.equal(loss, losses[0])
        assert all(map(torch.equal, some, parts[0]))
    found = losses[0], parts[0], joined(gradients, ends, 1)
    assert found[2].dtype == logits.dtype
    device = logits.device
    found = [type(parts[0])(*(part.to(device) for part in parts[0])) if f is parts[0] else f.to(device) for f in found]
    assert_found_within_bounds(found, logits, target, upstream=upstream, **options)


def of_many_ranks(function, *args):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives, "GATHER_RANKS", 0)
        return function(*args)


def many_ranks(function):
    """As if there were too many ranks to gather from."""
    return functools.partial(of_many_ranks, function)


# -- the numbers ------------------------------------------------------------------------------------------------------


@splits
@both_targets
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option(name, probabilities, ends, ranks, row_backend):
    interpreted = row_backend == "triton" and ranks.kind == "gloo"
    if interpreted and ends != SPLITS["2, uneven"]:
        pytest.skip("the interpreter takes long")
    logits, target, options = problem(N, K, OPTIONS[name], probabilities=probabilities)
    if not probabilities:
        target[4] = -100
    ways = itertools.product(("mean", "sum", "none"), (False, True))
    for reduction, recompute in [("mean", False), ("none", True)] if interpreted else ways:
        upstream = torch.randn(N) if reduction == "none" else torch.tensor(-3.0)
        how = {"recompute": recompute, "backend": row_backend}
        options["reduction"] = reduction
        assert_is_of_one_rank(ranks, ends, logits, target, options, upstream=upstream, **how)


@both_targets
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_every_dtype(dtype, probabilities, ranks, row_backend):
    if dtype == torch.float64 and row_backend == "triton":
        pytest.skip("refused")
    logits, target, options = problem(N, K, OPTIONS["all"], probabilities=probabilities, dtype=dtype)
    ends = SPLITS["2, uneven"] if ranks.num_ranks > 1 else SPLITS["1"]
    for how in ({"recompute": True}, {"recompute": False, "inplace": True}):
        given = options | {"reduction": "sum"}
        assert_is_of_one_rank(ranks, ends, logits, target, given, backend=row_backend, **how)


@pytest.mark.parametrize("name", ["default", "all"])
def test_compiled(name, ranks):
    logits, target, options = problem(40, 3000, OPTIONS[name])
    ends = (0, 1000), (1000, 1005), (1005, 3000)  # two versions of a pass, and too few classes for any
    assert_is_of_one_rank(ranks, ends, logits, target, options, backend="compile")


def test_large_offsets_and_targets_far_above(ranks, row_backend):
    logits, target, _ = problem(N, K, {}, spread=10.0)
    logits += 1000
    logits[torch.arange(N), target] += 30
    for ends in (SPLITS["1"], SPLITS["2, uneven"]):
        if len(ends) <= ranks.num_ranks:
            assert_is_of_one_rank(ranks, ends, logits, target, {"reduction": "none"}, backend=row_backend)


@pytest.mark.parametrize("options", [{}, {"weight": True}, {"label_smoothing": 0.1}], ids=str)
@pytest.mark.parametrize("ignored", ["some", "all", "no rows"])
def test_a_rank_without_targets_and_ignored_rows(ignored, options, ranks, row_backend):
    logits, target, options = problem(0 if ignored == "no rows" else N, K, options)
    target %= 20
    target[2 : (N if ignored == "all" else 4)] = 7
    logits[target == 7] = torch.nan
    if ignored == "all":
        target[:] = 7
    options |= {"ignore_index": 7, "backend": row_backend}
    ends = ((0, K),) if ranks.num_ranks == 1 else ((0, 30), (30, K))
    answers = ranks.run(len(ends), on_rank, ends, logits, target, options)
    loss, parts, gradient = loss_and_gradient(logits, target, **options | {"backend": "eager"})
    for loss_of_rank, parts_of_rank, _ in answers:
        torch.testing.assert_close(loss_of_rank, loss.cpu(), equal_nan=True)
        torch.testing.assert_close(tuple(parts_of_rank), tuple(part.cpu() for part in parts), equal_nan=True)
    found = joined([answer[2] for answer in answers], ends, 1)
    torch.testing.assert_close(found, gradient.cpu(), rtol=1e-4, atol=1e-7)
    assert (found[target.cpu() == 7] == 0).all()


@pytest.mark.parametrize("many", [False, True], ids=["few ranks", "many ranks"])
def test_masked_classes_and_what_is_not_finite(many, ranks, row_backend):
    logits, target, _ = problem(N, K, {})
    target[:] = torch.arange(N) + 31
    logits[0, :30] = -torch.inf  # a whole shard
    logits[1, 30:] = -torch.inf  # that of the target
    logits[2] = -torch.inf
    logits[3, 2] = torch.nan
    logits[4, 40] = torch.inf
    logits[5, ::2] = -torch.inf
    ends = ((0, K),) if ranks.num_ranks == 1 else SPLITS["2"]
    for recompute in (False, True):
        options = {"reduction": "none", "recompute": recompute}
        options["backend"] = row_backend
        answers = ranks.run(len(ends), many_ranks(on_rank) if many else on_rank, ends, logits, target, options)
        loss, _, gradient = loss_and_gradient(logits, target, **options)
        assert loss.isnan().tolist() == [False, False, True, True, True, False, False, False, False]
        assert loss[1] == torch.inf
        for loss_of_rank, _, _ in answers:
            torch.testing.assert_close(loss_of_rank, loss.cpu(), equal_nan=True)
        found = joined([answer[2] for answer in answers], ends, 1)
        torch.testing.assert_close(found, gradient.cpu(), rtol=1e-4, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("shape", [(K,), (0, K), (2, K, 3), (2, K, 0)], ids=str)
@both_targets
def test_shapes(shape, probabilities, ranks):
    logits = torch.randn(shape)
    classes = min(1, len(shape) - 1)
    target = torch.randint(K, shape[:classes] + shape[classes + 1 :])
    if probabilities:
        target = torch.rand(shape)
    for reduction in ("none", "sum"):
        options = {"reduction": reduction}
        upstream = torch.ones(target.shape if not probabilities else target.sum(classes).shape)
        upstream = upstream if reduction == "none" else None
        answers = ranks.run(2, on_rank, SPLITS["2, uneven"], logits, target, options, upstream)
        loss, _, gradient = truth(logits, target, upstream=upstream, **options)
        assert answers[0][0].shape == loss.shape
        torch.testing.assert_close(answers[0][0].double(), loss, rtol=1e-5, atol=1e-5)
        found = joined([answer[2] for answer in answers], SPLITS["2, uneven"], classes)
        torch.testing.assert_close(found.double(), gradient, rtol=1e-4, atol=1e-6)


def with_slices(group, ends, logits, target, weight):
    shard = VocabShard(*ends[group.rank()], K, group)
    whole = on_rank(group, ends, logits, target, {"weight": weight})
    target = of_shard(target, shard, 1) if target.dim() == 2 else target
    return whole, on_rank(group, ends, logits, target, {"weight": of_shard(weight, shard, 0)})


@both_targets
def test_weights_and_probabilities_of_the_shard_or_of_all(probabilities, ranks):
    logits, target, options = problem(N, K, OPTIONS["weight"], probabilities=probabilities)
    for whole, slices in ranks.run(4, with_slices, SPLITS["4"], logits, target, options["weight"]):
        torch.testing.assert_close(slices, whole, rtol=0, atol=0)


def test_with_reg_weight_0_it_is_cross_entropy(ranks):
    logits, target, options = problem(N, K, OPTIONS["weight+smoothing"])
    leaf = logits.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(leaf, target, **options)
    loss.backward()
    answers = ranks.run(3, on_rank, SPLITS["3, one empty"], logits, target, options | {"reg_weight": 0.0})
    torch.testing.assert_close(answers[2][0], loss.detach())
    torch.testing.assert_close(joined([g for _, _, g in answers], SPLITS["3, one empty"], 1), leaf.grad)


# -- the collectives --------------------------------------------------------------------------------------------------


def counted(group, options, recompute, linear):
    shard = VocabShard.even(K, group)
    logits = of_shard(problem(N, K, {})[0], shard, 1).requires_grad_()
    target = torch.arange(N)
    losses = []
    if linear:
        input, W, _, target, _ = linear_problem((N,), D, K, {})
        W = W[shard.start : shard.stop].detach().requires_grad_()

    def forward():
        if linear:
            losses.append(linear_self_regularized_entropy(input, W, target, shard=shard, **options))
        else:
            losses.append(self_regularized_entropy(logits, target, shard=shard, recompute=recompute, **options))

    return collectives_of(forward), collectives_of(lambda: losses[0].sum().backward())


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("recompute", [False, True])
def test_two_collectives_a_step_and_none_in_the_backward(recompute, reduction, ranks):
    for options in ({}, {"label_smoothing": 0.1, "weight": torch.ones(K)}):
        for forward, backward in ranks.run(3, counted, options | {"reduction": reduction}, recompute, False):
            numbers = 11 + (5 if options else 4) * N, 2 * N  # in front of them what the ranks compare
            assert forward == [("all_gather", 4 * numbers[0]), ("all_reduce", 4 * numbers[1])]
            assert backward == []


def test_a_chunk_of_the_linear_loss_has_one_more(ranks):
    for forward, backward in ranks.run(2, counted, {"chunk_rows": 5}, None, True):
        calls = []
        for rows in (5, N - 5):
            numbers = {"all_gather": [11 + 4 * rows], "all_reduce": [2 * rows, D * rows]}  # the last is of the features
            calls += [(name, 4 * n) for name in numbers for n in numbers[name]]
        assert sorted(forward) == sorted(calls)  # that of the features begins when gloo has a thread for it
        assert backward == []


@both_targets
@pytest.mark.parametrize("name", ["default", "weight+smoothing", "all"])
def test_many_ranks(name, probabilities, ranks):
    logits, target, options = problem(N, K, OPTIONS[name], probabilities=probabilities)
    for ends in (SPLITS["1"], SPLITS["3, one empty"]):
        answers = ranks.run(len(ends), many_ranks(on_rank), ends, logits, target, options)
        found = *answers[0][:2], joined([gradient for _, _, gradient in answers], ends, 1)
        assert_found_within_bounds(found, logits, target, **options)
    numbers = 2 * 9 + N, 2 + 3 * N, 2 * N
    for forward, backward in ranks.run(2, many_ranks(counted), {}, False, False):
        assert forward == [("all_reduce", 4 * n) for n in numbers]
        assert backward == []


# -- what goes wrong --------------------------------------------------------------------------------------------------

# What one of the ranks does otherwise, and what all are told then.
DIFFERENT = "^shard: expected the same call on all ranks of the group, but the numbers of rows or classes, the dtypes"
TWICE = "^shard: expected the shards of the group's ranks to hold each of the 60 classes once"
DIFFERENCES = {
    "c": ({"c": 1e-6}, DIFFERENT),
    "reg_weight": ({"reg_weight": torch.tensor(0.5)}, DIFFERENT),
    "class_mean": ({"class_mean": True}, DIFFERENT),
    "label_smoothing": ({"label_smoothing": 0.1}, DIFFERENT),
    "z_loss": ({"z_loss": 0.1}, DIFFERENT),
    "softcap": ({"softcap": 30.0}, DIFFERENT),
    "ignore_index": ({"ignore_index": 3}, DIFFERENT),
    "reduction": ({"reduction": "sum"}, DIFFERENT),
    "denominator": ({"denominator": 7.0}, DIFFERENT),
    "dtype": ({"dtype": torch.bfloat16}, DIFFERENT),
    "probabilities": ({"target": torch.rand(N, K)}, DIFFERENT),
    "classes": ({"shard": (40, 70, 70)}, DIFFERENT),
    "an overlap": ({"shard": (39, 60, 60)}, TWICE),
    "a gap": ({"shard": (41, 60, 60)}, TWICE),
    "all classes again": ({"shard": (0, 60, 60)}, TWICE),
}


def otherwise(group, changes, readable):
    """What the last of the ranks is told if it calls with changes, and the others, that do not."""
    start, stop, num_classes = (0, 20, 60) if group.rank() == 0 else (20, 40, 60)
    options = {}
    if group.rank() == 2:
        options = dict(changes)
        start, stop, num_classes = options.pop("shard", (40, 60, 60))
    logits = torch.zeros(N, stop - start, dtype=options.pop("dtype", torch.float32), requires_grad=True)
    target = options.pop("target", torch.arange(N))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives, "READABLE", readable)
        try:
            loss = self_regularized_entropy(
                logits, target, shard=VocabShard(start, stop, num_classes, group), **options
            )
        except RuntimeError as error:
            return str(error)
        loss.backward()
        return loss, logits.grad


@pytest.mark.parametrize("what", DIFFERENCES)
def test_other_calls_are_errors_on_every_rank(what, ranks):
    changes, message = DIFFERENCES[what]
    for rank, answer in enumerate(ranks.run(3, otherwise, changes, ("cpu",))):
        assert isinstance(answer, str)
        with pytest.raises(RuntimeError, match=message):
            raise RuntimeError(answer)
        if message == DIFFERENT:
            assert answer.endswith(f"between this rank and rank {2 if rank < 2 else 0} of the group")


@pytest.mark.parametrize("what", DIFFERENCES)
def test_on_a_gpu_they_are_nan(what, ranks):
    for loss, gradient in ranks.run(3, otherwise, DIFFERENCES[what][0], ()):
        assert loss.isnan()
        assert gradient.isnan().all(1).sum() >= N - (what == "ignore_index")  # a row that a rank ignores is 0


def test_of_many_ranks_too(ranks):
    for what in ("c", "dtype", "classes", "an overlap"):
        for answer in ranks.run(3, many_ranks(otherwise), DIFFERENCES[what][0], ("cpu",)):
            assert answer.startswith("shard: expected the")


def with_targets_of_their_own(group):
    shard = VocabShard.even(K, group)
    target = torch.tensor([0, 59, 3]) if group.rank() == 0 else torch.tensor([0, 0, 59])
    logits = torch.zeros(3, shard.stop - shard.start, requires_grad=True)
    return self_regularized_entropy(logits, target, shard=shard, reduction="none")


def test_a_target_that_no_rank_or_two_have_is_nan(ranks):
    for loss in ranks.run(2, with_targets_of_their_own):
        assert loss.isnan().tolist() == [False, True, True]


def fail(rank, what):
    shard, num_rows, dtype, options = VocabShard.even(K), N, torch.float32, {}
    logits, target = torch.zeros(num_rows, shard.stop - shard.start, dtype=dtype), torch.arange(num_rows)
    self_regularized_entropy(logits, target, shard=shard)
    if rank == 1:
        if what == "dies":
            os._exit(1)
        elif what == "sleeps":
            time.sleep(7)
        elif what == "fewer rows":
            logits, target = logits[1:], target[1:]
        elif what == "another dtype":
            logits = logits.double()
        else:
            options["weight"] = torch.ones(K)
    return self_regularized_entropy(logits, target, shard=shard, **options)


@pytest.mark.parametrize("what", ["dies", "sleeps", "fewer rows", "another dtype", "weight"])
def test_a_rank_that_fails_ends_in_errors_on_the_others(what):
    answers = spawn(3, fail, what, timeout=5)
    for rank in (0, 2):
        # Gloo ends a process that receives more than it expects.
        if rank in answers:
            seconds, error = answers[rank]
            assert isinstance(error, RuntimeError), error
            assert seconds < 10
        else:
            assert what not in ("dies", "sleeps")


# -- at home in PyTorch -----------------------------------------------------------------------------------------------


def compiled_by_the_user(group, backend, recompute):
    from torch._dynamo.testing import CompileCounterWithBackend  # slow to import, and all ranks import this file

    shard = VocabShard.even(K, group)
    counter = CompileCounterWithBackend("aot_eager")

    def step(logits, target, reg_weight, **options):
        given = {"shard": shard, "return_parts": True, "recompute": recompute, "backend": backend}
        loss, parts = self_regularized_entropy(logits, target, reg_weight=reg_weight, **given, **options)
        return 2 * loss, parts

    graph = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    answers, counts = [], []
    for rows in (5, 9, 12):
        logits, target, _ = problem(rows, K, {})
        options = {"c": 1e-3 / rows, "label_smoothing": 0.2 / rows, "z_loss": 0.2 / rows, "softcap": 1.0 * rows}
        both = []
        for function in (step, graph):
            leaf = of_shard(logits, shard, 1).clone().requires_grad_()
            loss, parts = function(leaf, target, torch.tensor(0.5), ignore_index=rows, **options)
            loss.backward()
            both.append((loss, parts, leaf.grad))
        answers.append(both)
        counts.append(counter.frame_count)
    return answers, counts


@pytest.mark.parametrize("recompute", [False, True])
def test_under_the_users_compile(recompute, ranks, row_backend):
    for answers, counts in ranks.run(min(2, ranks.num_ranks), compiled_by_the_user, row_backend, recompute):
        for eager, graph in answers:
            torch.testing.assert_close(graph, eager)
        assert counts[0] == counts[-1]  # no recompilation


def transformed(group):
    shard = VocabShard.even(K, group)
    logits, target, _ = problem(N, K, {})
    logits = of_shard(logits, shard, 1)

    def loss(z):
        return self_regularized_entropy(z, target, shard=shard)

    batch = torch.stack([logits, 2 * logits])
    many = torch.func.vmap(torch.func.grad(loss))(batch)
    each = torch.stack([torch.func.grad(loss)(one) for one in batch])
    leaf = logits.clone().requires_grad_()
    torch.utils.checkpoint.checkpoint(lambda z: loss(z * 1), leaf, use_reentrant=False).backward()
    again = logits.clone().requires_grad_()
    value = self_regularized_entropy(again, target, shard=shard, recompute=True)
    value.backward(retain_graph=True)
    value.backward()
    with torch.no_grad():
        without = loss(logits)
    once = logits.clone().requires_grad_()
    value = loss(once)
    value.backward(retain_graph=True)
    try:
        value.backward()
    except RuntimeError as error:
        message = str(error)
    return many, each, leaf.grad, again.grad / 2, without, value, message


def test_transforms_checkpoints_and_second_backwards(ranks):
    for many, each, checkpointed, twice, without, value, message in ranks.run(2, transformed):
        torch.testing.assert_close(many, each)
        torch.testing.assert_close(checkpointed, each[0])
        torch.testing.assert_close(twice, each[0])
        assert torch.equal(without, value)
        assert "recompute=True" in message


def by_modules(group):
    shard = VocabShard.even(K, group)
    input, W, b, target, _ = linear_problem((N,), D, K, {})
    logits = torch.nn.functional.linear(input, W, b)[:, shard.start : shard.stop]
    plain = SelfRegularizedEntropyLoss(shard=shard)(logits, target)
    head = LinearSelfRegularizedEntropyLoss(D, K, bias=True, shard=shard)
    with torch.no_grad():
        head.linear.weight.copy_(W[shard.start : shard.stop])
        head.linear.bias.copy_(b[shard.start : shard.stop])
    return plain, head(input, target), self_regularized_entropy(torch.nn.functional.linear(input, W, b), target)


def test_modules(ranks):
    for plain, linear, alone in ranks.run(2, by_modules):
        torch.testing.assert_close(plain, alone)
        torch.testing.assert_close(linear, alone)


def of_other_widths(group):
    """Losses and gradients for targets in int64 and in narrower dtypes."""
    shard = VocabShard.even(K, group)
    input, W, b, target, _ = linear_problem((N,), D, K, {})
    logits = torch.nn.functional.linear(input, W, b)
    target[3] = -100
    found = []
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8):
        leaves = [of_shard(logits, shard, 1).detach().requires_grad_(), input.detach().requires_grad_()]
        losses = (
            self_regularized_entropy(leaves[0], target.to(dtype), shard=shard),
            linear_self_regularized_entropy(leaves[1], of_shard(W, shard, 0), target.to(dtype), shard=shard),
        )
        found.append([*losses, *torch.autograd.grad(sum(losses), leaves)])
    return found


def test_class_indices_of_other_widths(ranks):
    for expected, *others in ranks.run(2, of_other_widths):
        for found in others:
            assert all(map(torch.equal, found, expected))


def many_classes(group):
    """The warnings of shards that have fewer than 256 classes, or that have as many together."""
    said = []
    for num_classes, reg_weight in ((255, 0.5), (256, 0.0), (256, 0.5)):
        shard = VocabShard.even(num_classes, group)
        messages._warned.clear()
        logits, target = torch.zeros(2, shard.stop - shard.start), torch.zeros(2, dtype=torch.long)
        head = LinearSelfRegularizedEntropyLoss(D, num_classes, reg_weight=reg_weight, shard=shard)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self_regularized_entropy(logits, target, reg_weight=reg_weight, shard=shard)
            said.append(len(caught))
            messages._warned.clear()
            SelfRegularizedEntropyLoss(reg_weight=reg_weight, shard=shard)(logits, target)
            said.append(len(caught))
            messages._warned.clear()
            head(torch.zeros(2, D), target)
            said.append(len(caught))
    messages._warned.update(messages.ONCE)
    return said


def test_the_classes_of_all_shards_are_many(ranks):
    for said in ranks.run(2, many_classes):
        assert said == [0, 0, 0, 0, 0, 0, 1, 2, 3]


class ShardedStep(torch.nn.Module):
    def __init__(self, head, criterion):
        super().__init__()
        self.head, self.criterion = head, criterion

    def forward(self, input, target):
        return self.criterion(input if self.head is None else self.head(input), target)


def exported(group, ends, tensors, target, weight):
    """Loss and gradients of input, W and b, of exported programs: of a layer and the loss, and both in one."""
    shard = VocabShard(*ends[group.rank()], K, group)
    input, W, b = tensors
    answers = []
    for linear in (False, True):
        if linear:
            head, step = None, LinearSelfRegularizedEntropyLoss(D, K, bias=True, shard=shard, weight=weight)
        else:
            head = torch.nn.Linear(D, shard.stop - shard.start)
            step = SelfRegularizedEntropyLoss(shard=shard, weight=weight)
        layer = step.linear if linear else head
        with torch.no_grad():
            layer.weight.copy_(of_shard(W, shard, 0))
            layer.bias.copy_(of_shard(b, shard, 0))
        program = torch.export.export(ShardedStep(head, step), (input[:3].detach(), target[:3]), dynamic_shapes=ROWS)
        leaf = input.detach().requires_grad_()
        loss = program.module()(leaf, target)
        gradients = torch.autograd.grad(loss, [leaf, *program.module().parameters()])
        answers.append((loss, gradients))
    return answers


ROWS = [{0: torch.export.Dim("rows", min=2)}] * 2


@pytest.mark.parametrize("weighted", [False, True])
def test_exported_programs_train(weighted, ranks):
    *tensors, target, options = linear_problem((N,), D, K, {"weight": weighted} if weighted else {})
    ends = SPLITS["2, uneven"]
    answers = ranks.run(2, exported, ends, [tensor.detach() for tensor in tensors], target, options.get("weight"))
    true_loss, _, (of_input, of_weight, of_bias), _ = linear_truth(*tensors, target, **options)
    for linear in (False, True):
        (loss, gradients), (other, others) = (answer[linear] for answer in answers)
        assert torch.equal(loss, other)
        torch.testing.assert_close(loss.double(), true_loss, rtol=1e-5, atol=1e-6)
        # Plain, each rank has the gradient of its own logits; in one, the sum over the ranks.
        found = gradients[0] if linear else gradients[0] + others[0]
        torch.testing.assert_close(found.double(), of_input, rtol=1e-4, atol=1e-6)
        for i, expected in ((1, of_weight), (2, of_bias)):
            found = joined([gradients[i], others[i]], ends, 0)
            torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


def traced(group):
    shard = VocabShard.even(K, group)
    x, y, layer = torch.randn(3, D), torch.arange(3), torch.nn.Linear(D, K)
    head = LinearSelfRegularizedEntropyLoss(D, K, shard=shard)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        for step in (ShardedStep(layer, SelfRegularizedEntropyLoss(shard=shard)), ShardedStep(None, head)):
            with pytest.raises(RuntimeError, match="knows no sharded classes, or use torch.export"):
                torch.jit.trace(step, (x, y))
            with pytest.raises(NotImplementedError, match="forward mode .* unless classes are sharded"):
                torch.func.jvp(lambda x, step=step: step(x, y), (x,), (x,))
        torch.jit.save(torch.jit.script(torch.nn.Sequential(Held(head), layer)), file)
        file.seek(0)
        return torch.jit.load(file)(x), layer(x)


class Held(torch.nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, x):
        return x


def test_scripts_traces_and_forward_mode(ranks):
    ((found, expected),) = ranks.run(1, traced)
    assert torch.equal(found, expected)


# -- linear layer and loss --------------------------------------------------------------------------------------------


def linear_on_rank(group, ends, tensors, target, options, upstream=None, wanted=(True, True, True)):
    """Loss, parts, the input's gradient, and those of this rank's rows of W and b."""
    shard = VocabShard(*ends[group.rank()], K, group)
    device = torch.get_default_device()
    leaves = [tensors[0], *(of_shard(tensor, shard, 0) for tensor in tensors[1:])]
    leaves = [leaf.to(device).clone().requires_grad_(want) for leaf, want in zip(leaves, wanted, strict=True)]
    options = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    loss, parts = linear_self_regularized_entropy(
        *leaves[:2], target.to(device), linear_bias=leaves[2], shard=shard, return_parts=True, **options
    )
    if any(wanted):
        loss.backward(torch.ones_like(loss) if upstream is None else upstream.to(device))
    return loss, parts, [leaf.grad for leaf in leaves]


def assert_linear_is_of_one_rank(ranks, ends, tensors, target, options, *, upstream=None, **how):
    given = [tensor.detach() for tensor in tensors]
    answers = ranks.run(len(ends), linear_on_rank, ends, given, target, options | how, upstream)
    for loss, parts, gradients in answers:
        assert torch.equal(loss, answers[0][0])
        assert all(map(torch.equal, parts, answers[0][1]))
        assert torch.equal(gradients[0], answers[0][2][0])
    gradients = [answer[2] for answer in answers]
    of_parameters = (joined([gradient[i] for gradient in gradients], ends, 0) for i in (1, 2))
    device = target.device
    loss, parts = answers[0][0].to(device), type(answers[0][1])(*(part.to(device) for part in answers[0][1]))
    found = loss, parts, [gradient.to(device) for gradient in (gradients[0][0], *of_parameters)]
    assert_linear_within_bounds(found, tensors, target, upstream=upstream, **options)


@splits
@both_targets
@pytest.mark.parametrize("name", OPTIONS)
def test_linear_with_every_option(name, probabilities, ends, ranks):
    *tensors, target, options = linear_problem((N,), D, K, OPTIONS[name], probabilities=probabilities)
    if not probabilities:
        options["ignore_index"] = int(target[4])  # which is a class with a weight
    for reduction in ("mean", "sum", "none"):
        upstream = torch.randn(N) if reduction == "none" else torch.tensor(-3.0)
        for chunk_rows in (None, 4):
            more = options | {"reduction": reduction}
            assert_linear_is_of_one_rank(ranks, ends, tensors, target, more, upstream=upstream, chunk_rows=chunk_rows)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_linear_in_every_dtype(dtype, ranks, row_backend):
    *tensors, target, options = linear_problem((N,), D, K, OPTIONS["all"], dtype=dtype)
    ends = SPLITS["2, uneven"] if ranks.num_ranks > 1 else SPLITS["1"]
    for reduction in ("mean", "none"):
        more = options | {"reduction": reduction}
        assert_linear_is_of_one_rank(ranks, ends, tensors, target, more, chunk_rows=4, backend=row_backend)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, False)], ids=str)
def test_linear_computes_only_gradients_that_are_wanted(wanted, ranks):
    *tensors, target, _ = linear_problem((N,), D, K, {})
    tensors = [tensor.detach() for tensor in tensors]
    given = SPLITS["2"], tensors, target, {"chunk_rows": 4}
    everything, some = ranks.run(2, linear_on_rank, *given), ranks.run(2, linear_on_rank, *given, None, wanted)
    for (loss, _, gradients), (loss_again, _, found) in zip(everything, some, strict=True):
        assert torch.equal(loss, loss_again)
        for want, gradient, again in zip(wanted, gradients, found, strict=True):
            assert again is None if not want else torch.equal(gradient, again)


def linear_compiled_by_the_user(group):
    shard = VocabShard.even(K, group)
    input, W, _, target, _ = linear_problem((N,), D, K, {})
    tensors = input.detach().requires_grad_(), of_shard(W, shard, 0).detach().requires_grad_()

    def step(input, W, target):
        options = {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 5.0}
        return linear_self_regularized_entropy(input, W, target, chunk_rows=4, shard=shard, **options)

    found = []
    for function in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        loss = function(*tensors, target)
        found.append((loss, *torch.autograd.grad(loss, tensors)))
    return found


def test_linear_under_the_users_compile(ranks):
    for eager, graph in ranks.run(2, linear_compiled_by_the_user):
        torch.testing.assert_close(graph, eager)


# -- what is passed ---------------------------------------------------------------------------------------------------


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def loaded(data, **options):
    return torch.load(io.BytesIO(data), **{"weights_only": False} | options)


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "torch.save": lambda value: loaded(saved(value)),
    "AveragedModel": lambda value: torch.optim.swa_utils.AveragedModel(value).module,
}


def modules_of(group):
    """Both modules with this rank's classes, of the group and of the default group."""
    torch.manual_seed(0)
    for shard in (VocabShard.even(K, group), VocabShard.even(K)):
        yield SelfRegularizedEntropyLoss(shard=shard)
        yield LinearSelfRegularizedEntropyLoss(D, K, shard=shard)


@torch.no_grad()
def loss_of(module):
    """The loss, and what it is to be, of features and weights that are all the same."""
    plain = isinstance(module, SelfRegularizedEntropyLoss)
    if not plain:
        module.linear.weight.fill_(1.0)
    shard = module.shard
    input = torch.zeros(N, shard.stop - shard.start) if plain else torch.zeros(N, D)
    losses = module(input, torch.arange(N)), self_regularized_entropy(torch.zeros(N, K), torch.arange(N))
    return [loss.item() for loss in losses]


def copied(group):
    losses = []
    for module in modules_of(group):
        for make in COPIES.values():
            other = make(module)
            assert other.shard == module.shard
            assert hash(other.shard) == hash(module.shard)
            assert other.shard.group is module.shard.group
            losses.append(loss_of(other))
        assert COPIES["deepcopy"](module).reg_weight is not module.reg_weight
    assert VocabShard.even(K, group).group is group
    assert VocabShard.even(K) == VocabShard.even(K, torch.distributed.group.WORLD) != VocabShard.even(K, group)
    return losses


def test_copies_share_the_group(ranks):
    for losses in ranks.run(ranks.num_ranks, copied):
        assert len(losses) == 4 * len(COPIES)
        for loss, expected in losses:
            assert loss == pytest.approx(expected, rel=1e-5)


def modules_saved(group):
    shard = VocabShard.even(K, group)
    return saved(list(modules_of(group))), saved({"shard": shard}), repr(shard)


def of_another_process(rank, files):
    """What the saved modules say before there is a group of that name, and their losses afterwards."""
    modules = loaded(files[rank])
    said = []
    for module in modules[:2]:
        with pytest.raises(RuntimeError) as raised:
            loss_of(module)
        said.append(str(raised.value))
    for size in range(1, 5):  # as where they were saved (ranks.py)
        torch.distributed.new_group(list(range(size)))
    return said, [loss_of(module) for module in modules]


def test_what_is_loaded_finds_the_group_or_says_what_is_missing(ranks):
    files, shards, texts = zip(*ranks.run(4, modules_saved), strict=True)
    for file, shard, text in zip(files, shards, texts, strict=True):
        for module in loaded(saved(loaded(file))):  # not even torch.distributed is there, and nothing is lost
            assert text in repr(module)
            with pytest.raises(RuntimeError, match="^group: expected torch.distributed to be initialized"):
                loss_of(module)
        with pytest.raises(pickle.UnpicklingError, match="VocabShard"):
            loaded(shard, weights_only=True)
        with torch.serialization.safe_globals([VocabShard]):
            assert repr(loaded(shard, weights_only=True)["shard"]) == text
    answers = spawn(4, of_another_process, files, timeout=30)
    assert set(answers) == set(range(4))
    for _, (said, losses) in answers.values():
        for message in said:
            assert message.startswith("group: expected the process group '4', for which the shard was made, to be ")
        for loss, expected in losses:
            assert loss == pytest.approx(expected, rel=1e-5)


def refused(group):
    said = []

    def note(error, function, *args, **options):
        with pytest.raises(error) as raised:
            function(*args, **options)
        said.append(str(raised.value))

    shard = VocabShard(10, 40, K, group)
    logits, target = torch.zeros(N, 30), torch.arange(N)
    note(ValueError, self_regularized_entropy, torch.zeros(N, K), target, shard=shard)
    note(ValueError, self_regularized_entropy, logits, torch.rand(N, 31), shard=shard)
    note(ValueError, self_regularized_entropy, logits, target, torch.ones(31), shard=shard)
    note(ValueError, self_regularized_entropy, logits, target, shard=shard, backend="eager")
    note(IndexError, self_regularized_entropy, logits, target + K, shard=shard)
    note(ValueError, linear_self_regularized_entropy, torch.zeros(N, D), torch.zeros(K, D), target, shard=shard)
    note(ValueError, LinearSelfRegularizedEntropyLoss, D, K + 1, shard=shard)
    note(TypeError, self_regularized_entropy, logits, target, shard=(10, 40))
    note(ValueError, VocabShard, 10, 61, K, group)
    note(ValueError, VocabShard, 0, 0, 0, group)
    note(ValueError, VocabShard, 10, 9, K, group)
    note(TypeError, VocabShard, 0.0, 10, K, group)
    note(TypeError, VocabShard, 0, 10, K, "group")
    note(TypeError, VocabShard.even, "60")
    note(TypeError, VocabShard.even, 60, "group")
    note(TypeError, VocabShard.from_dtensor, logits)
    note(ValueError, VocabShard, 0, 10, -(10**5000), group)
    note(ValueError, self_regularized_entropy, torch.zeros(N, 2, 30), torch.zeros(N, 2).long(), shard=shard)
    note(TypeError, self_regularized_entropy, logits.to_sparse(), target, shard=shard)
    note(TypeError, self_regularized_entropy, logits, target.to_sparse(), shard=shard)
    note(TypeError, self_regularized_entropy, torch.nn.UninitializedParameter(), target, shard=shard)
    note(TypeError, self_regularized_entropy, logits, target.float(), shard=shard)
    one_hot = torch.nn.functional.one_hot(target, K)
    note(TypeError, self_regularized_entropy, logits, one_hot, shard=shard)
    note(TypeError, self_regularized_entropy, logits.unsqueeze(2), target.unsqueeze(1).float(), shard=shard)
    note(TypeError, SelfRegularizedEntropyLoss, torch.ones(30).to_sparse(), shard=shard)
    note(ValueError, SelfRegularizedEntropyLoss, torch.ones(31), shard=shard)
    note(
        TypeError,
        linear_self_regularized_entropy,
        torch.zeros(N, D).to_mkldnn(),
        torch.zeros(30, D),
        target,
        shard=shard,
    )
    return said


def test_errors_say_what_was_expected(ranks):
    (said,) = ranks.run(1, refused)
    said = [re.sub("<int .*>", "<int>", message) for message in said]  # from Python 3.15 on with its size
    assert said == [
        "input: expected logits of the shard's 30 classes in dimension 1, got a float32 tensor of shape (9, 60)",
        "target: expected probabilities of 30 or 60 classes in dimension 1, got a float32 tensor of shape (9, 31)",
        "weight: expected a tensor of shape (30,) or (60,), got a float32 tensor of shape (31,)",
        "backend: expected 'triton' or 'compile' for classes that are sharded, without torch.func transforms inside "
        "torch.compile, and a target and weight that require no gradient, got 'eager'",
        "target: expected class indices from 0 to 59 or ignore_index=-100, got 60",
        "linear_weight: expected a tensor of shape (30, 16), of this shard, for input of shape (9, 16), "
        "got a float32 tensor of shape (60, 16)",
        "shard: expected one of 61 classes, as num_classes, got VocabShard(start=10, stop=40, num_classes=60)",
        "shard: expected a VocabShard or None, got (10, 40)",
        "shard: expected 0 <= start <= stop <= num_classes and a class at least, got start=10, stop=61, num_classes=60",
        "shard: expected 0 <= start <= stop <= num_classes and a class at least, got start=0, stop=0, num_classes=0",
        "shard: expected 0 <= start <= stop <= num_classes and a class at least, got start=10, stop=9, num_classes=60",
        "start: expected an int, got 0.0",
        "group: expected a torch.distributed.ProcessGroup or None, got 'group'",
        "num_classes: expected an int, got '60'",
        "group: expected a torch.distributed.ProcessGroup or None, got 'group'",
        "tensor: expected a DTensor that is sharded on classes over one dimension of its mesh, "
        "got a float32 tensor of shape (9, 30)",
        "shard: expected 0 <= start <= stop <= num_classes and a class at least, "
        "got start=0, stop=10, num_classes=<int>",
        "input: expected logits of the shard's 30 classes in dimension 1, got a float32 tensor of shape (9, 2, 30); "
        "dimension 1 of the logits is the classes: pass input.movedim(-1, 1)",
        "input: expected a dense tensor, got a float32 sparse_coo tensor of shape (9, 30); input.to_dense() is one",
        "target: expected a dense tensor, got an int64 sparse_coo tensor of shape (9,); target.to_dense() is one",
        "input: expected a dense tensor, got an uninitialized parameter; the first forward of its module makes it one",
        "target: expected int64, int32, int16, int8 or uint8 class indices, or probabilities shaped as the logits, "
        "got a float32 tensor of shape (9,); target.long() makes class indices of it",
        "target: expected floating-point probabilities, since its shape is the logits', got an int64 tensor of shape "
        "(9, 30); target.float() converts it",
        "target: expected int64, int32, int16, int8 or uint8 class indices, or probabilities shaped as the logits, "
        "got a float32 tensor of shape (9, 1); target.long() makes class indices of it",
        "weight: expected a dense tensor, got a float32 sparse_coo tensor of shape (30,); weight.to_dense() is one",
        "weight: expected a tensor of shape (30,) or (60,), got a float32 tensor of shape (31,)",
        "input: expected a dense tensor, got a float32 mkldnn tensor of shape (9, 16); input.to_dense() is one",
    ]


def huge(group):
    shard, logits = VocabShard.even(10, group), torch.zeros(3, 10)
    options = ({"z_loss": 1e300}, {"reg_weight": 1e300}, {"reg_weight": -1e39})
    return [self_regularized_entropy(logits, torch.arange(3), shard=shard, **option) for option in options]


def test_numbers_that_float32_does_not_hold(ranks):
    (found,) = ranks.run(1, huge)
    assert found == [torch.inf, -torch.inf, torch.inf]


def test_without_a_process_group():
    with pytest.raises(RuntimeError, match="^group: expected torch.distributed to be initialized"):
        VocabShard(0, 10, 20)


def even(group, num_classes):
    shard = VocabShard.even(num_classes, group)
    return shard.start, shard.stop, len(torch.arange(num_classes).chunk(group.size())) > group.rank()


@pytest.mark.parametrize("num_classes", [1, 3, 5, 60, 61])
def test_even_shards_are_those_of_chunk(num_classes, ranks):
    ends = ranks.run(4, even, num_classes)
    chunks = torch.arange(num_classes).chunk(4)
    for (start, stop, there), chunk in zip(ends, (*chunks, *[None] * (4 - len(chunks))), strict=True):
        assert list(range(start, stop)) == (chunk.tolist() if there else [])
