"""DTensors: sharded on classes they are a shard each, sharded on rows as in data parallel training; nothing else."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import OPTIONS, assert_found_within_bounds, linear_problem, loss_and_gradient, problem

from sre_triton import (
    LinearSelfRegularizedEntropyLoss,
    Parts,
    SelfRegularizedEntropyLoss,
    VocabShard,
    linear_self_regularized_entropy,
    self_regularized_entropy,
)

N, K, D = 8, 61, 16
both_targets = pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])
# The mesh, and for each of its dimensions the dimension of the logits that it shards.
LAYOUTS = {
    "classes": ((4,), (1,)),
    "rows": ((4,), (0,)),
    "replicated": ((4,), (None,)),
    "rows, classes": ((2, 2), (0, 1)),
    "classes, rows": ((2, 2), (1, 0)),
    "replicated, classes": ((2, 2), (None, 1)),
    "classes, replicated": ((2, 2), (1, None)),
}
layouts = pytest.mark.parametrize(("mesh_shape", "dims"), LAYOUTS.values(), ids=LAYOUTS)


@functools.cache
def mesh_of(shape):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(torch.get_default_device().type, shape)


def placed(tensor, mesh, dims):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    placements = [Replicate() if dim is None else Shard(dim) for dim in dims]
    return distribute_tensor(tensor.detach().to(torch.get_default_device()), mesh, placements)


def whole(tensor):
    return tensor.full_tensor()


def on_mesh(_, mesh_shape, dims, logits, target, options, target_dims):
    """Loss, parts and gradient, whole. Without target_dims, the target is a plain tensor."""
    mesh = mesh_of(mesh_shape)
    leaf = placed(logits, mesh, dims).requires_grad_()
    target = target.to(leaf.device)
    if target_dims is not None:
        target = placed(target, mesh, target_dims)
    options = {name: value.to(leaf.device) if name == "weight" else value for name, value in options.items()}
    loss, parts = self_regularized_entropy(leaf, target, return_parts=True, **options)
    loss.sum().backward() if loss.dim() else loss.backward()
    alone = placed(logits, mesh, dims).requires_grad_()
    alone.to_local().sum().backward()  # in torch 2.11, replicated if the shards differ in size
    assert leaf.grad.placements == alone.grad.placements
    return whole(loss), tuple(map(whole, parts)), whole(leaf.grad)


def assert_is_of_one_rank(ranks, mesh_shape, dims, logits, target, options, target_dims):
    answers = ranks.run(4, on_mesh, mesh_shape, dims, logits, target, options, target_dims)
    for loss, parts, gradient in answers:
        found = [tensor.to(logits.device) for tensor in (loss, *parts, gradient)]
        found = found[0], Parts(*found[1:4]), found[4]
        upstream = torch.ones_like(found[0]) if options.get("reduction") == "none" else None
        assert_found_within_bounds(found, logits, target, upstream=upstream, **options)


@layouts
@both_targets
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_layout(reduction, probabilities, mesh_shape, dims, ranks):
    logits, target, options = problem(N, K, {"label_smoothing": 0.1, "z_loss": 0.01}, probabilities=probabilities)
    options["reduction"] = reduction
    as_logits = tuple(dim if dim == 0 or probabilities else None for dim in dims)
    replicated = (None,) * len(dims)
    for target_dims in (None, replicated, as_logits):
        assert_is_of_one_rank(ranks, mesh_shape, dims, logits, target, options, target_dims)


@both_targets
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option(name, probabilities, ranks):
    logits, target, options = problem(N, K, OPTIONS[name], probabilities=probabilities)
    if not probabilities and "weight" not in options:
        target[4] = -100
    assert_is_of_one_rank(ranks, (4,), (1,), logits, target, options, None)


def of_other_widths(_):
    """Losses and gradients for targets in int64 and in narrower dtypes, plain and DTensors."""
    mesh = mesh_of((4,))
    logits, target, _ = problem(N, K, {})
    target[1] = -100
    found = []
    for dims, dtype in itertools.product(((0,), (1,)), (torch.int64, torch.int32, torch.int16, torch.int8)):
        for given in (target.to(dtype), placed(target, mesh, (0,) if dims == (0,) else (None,)).to(dtype)):
            leaf = placed(logits, mesh, dims).requires_grad_()
            loss = self_regularized_entropy(leaf, given, reduction="sum")
            loss.backward()
            found.append((dims, whole(loss), whole(leaf.grad)))
    return found


def test_class_indices_of_other_widths(ranks):
    for found in ranks.run(4, of_other_widths):
        for dims, loss, gradient in found:
            _, expected_loss, expected = found[0] if dims == (0,) else found[len(found) // 2]
            assert torch.equal(loss, expected_loss)
            assert torch.equal(gradient, expected)


def placements_of(_, dims):
    mesh = mesh_of((2, 2))
    logits, target, _ = problem(N, K, {})
    leaf = placed(logits, mesh, dims)
    return [
        str(self_regularized_entropy(leaf, target.to(leaf.device), reduction=reduction).placements)
        for reduction in ("mean", "none")
    ]


def test_a_loss_says_where_it_lies(ranks):
    assert ranks.run(4, placements_of, (None, 1))[0] == 2 * ["(Replicate(), Replicate())"]
    assert ranks.run(4, placements_of, (0, 1))[0] == ["(Partial(sum), Replicate())", "(Shard(dim=0), Replicate())"]


def of_weights(_, weight_dims, rows):
    mesh = mesh_of((4,))
    logits, target, options = problem(N, K, OPTIONS["weight+smoothing"])
    leaf = placed(logits, mesh, (0 if rows else 1,))
    weight = options["weight"] if weight_dims is None else placed(options["weight"], mesh, weight_dims)
    return whole(self_regularized_entropy(leaf, target, weight, reduction="sum", label_smoothing=0.3))


@pytest.mark.parametrize("rows", [False, True], ids=["classes", "rows"])
@pytest.mark.parametrize("weight_dims", [None, (None,), (0,)], ids=str)
def test_class_weights(weight_dims, rows, ranks):
    if rows and weight_dims == (0,):
        pytest.skip("refused: every rank needs all of them")
    logits, target, options = problem(N, K, OPTIONS["weight+smoothing"])
    loss = self_regularized_entropy(logits, target, reduction="sum", **options)
    for found in ranks.run(4, of_weights, weight_dims, rows):
        torch.testing.assert_close(found, loss)


def rows_left_out(_, denominator):
    mesh = mesh_of((4,))
    logits, target, _ = problem(3, K, {})  # a rank has no row
    leaf = placed(logits, mesh, (0,)).requires_grad_()
    loss = self_regularized_entropy(leaf, target, denominator=denominator)
    loss.backward()
    return whole(loss), whole(leaf.grad)


@pytest.mark.parametrize("denominator", [None, 7.0])
def test_ranks_without_rows(denominator, ranks):
    logits, target, _ = problem(3, K, {})
    loss, _, gradient = loss_and_gradient(logits, target, denominator=denominator)
    for found in ranks.run(4, rows_left_out, denominator):
        torch.testing.assert_close(found, (loss, gradient))


# -- inside PyTorch's tensor parallelism ------------------------------------------------------------------------------


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.output = torch.nn.Linear(D, D), torch.nn.Linear(D, K)

    def forward(self, x):
        return self.output(self.body(x).relu())


def trained(_, mesh_shape, loss_of):
    """Losses and gradients of a model whose output layer is sharded on classes, and of the same on one rank."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, loss_parallel, parallelize_module

    torch.manual_seed(0)
    model = Model()
    alone = Model()
    alone.load_state_dict(model.state_dict())
    mesh = mesh_of(mesh_shape)
    style = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    parallelize_module(model, mesh, {"output": style})
    x, target = torch.randn(N, D), torch.randint(K, (N,))
    found = []
    for network in (model, alone):
        with loss_parallel():
            loss = loss_of(network(x), target)
            loss.backward()
        gradients = [parameter.grad for parameter in network.parameters()]
        found.append([getattr(tensor, "full_tensor", lambda tensor=tensor: tensor)() for tensor in (loss, *gradients)])
    return found


def plain(logits, target):
    return self_regularized_entropy(logits, target)


def without_regularizer(logits, target):
    return self_regularized_entropy(logits, target, reg_weight=0.0)


def test_inside_parallelize_module(ranks):
    for found, alone in ranks.run(4, trained, (4,), plain):
        torch.testing.assert_close(found, alone)


def test_without_the_regularizer_it_is_loss_parallel(ranks):
    ours, theirs = (ranks.run(4, trained, (4,), loss_of) for loss_of in (without_regularizer, F.cross_entropy))
    for (found, alone), (of_pytorch, _) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, of_pytorch)
        torch.testing.assert_close(found, alone)


def local_output(group):
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    torch.manual_seed(0)
    model = parallelize_module(Model(), mesh_of((4,)), {"output": ColwiseParallel(input_layouts=Replicate())})
    x, target = torch.randn(N, D), torch.randint(K, (N,))
    shard = VocabShard.from_dtensor(model.output.weight)
    even = VocabShard.even(K, group)
    assert (shard.start, shard.stop) == (even.start, even.stop)
    self_regularized_entropy(model(x), target, shard=shard).backward()
    sharded = [getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in model.parameters()]
    torch.manual_seed(0)
    alone = Model()
    self_regularized_entropy(alone(x), target).backward()
    return sharded, [p.grad for p in alone.parameters()]


def test_a_shard_from_a_dtensor(ranks):
    for sharded, alone in ranks.run(4, local_output):
        torch.testing.assert_close(sharded, alone)


def compiled_by_the_user(_):
    mesh = mesh_of((4,))
    logits, target, _ = problem(N, K, {})
    found = []
    for function in (self_regularized_entropy, torch.compile(self_regularized_entropy, backend="aot_eager")):
        leaf = placed(logits, mesh, (1,)).requires_grad_()
        loss = function(leaf, target)
        loss.backward()
        found.append((whole(loss), whole(leaf.grad)))
    return found


def test_under_the_users_compile(ranks):
    for eager, graph in ranks.run(4, compiled_by_the_user):
        torch.testing.assert_close(graph, eager)


# -- linear layer and loss --------------------------------------------------------------------------------------------


def linear_on_mesh(_, mesh_shape, row_dims, class_dims, reduction, bias):
    """Loss and gradients of features that are sharded on rows, a weight that is on classes."""
    mesh = mesh_of(mesh_shape)
    input, W, b, target, _ = linear_problem((N,), D, K, {})
    x = input.detach().requires_grad_() if row_dims is None else placed(input, mesh, row_dims).requires_grad_()
    W = placed(W, mesh, class_dims).requires_grad_()
    b = placed(b, mesh, class_dims).requires_grad_() if bias else None
    loss, parts = linear_self_regularized_entropy(
        x, W, target, linear_bias=b, chunk_rows=3, reduction=reduction, return_parts=True
    )
    (loss.sum() if loss.dim() else loss).backward()
    gradients = [leaf.grad for leaf in (x, W, b) if leaf is not None]
    assert all(g.placements == leaf.placements for g, leaf in zip(gradients[1:], (W, b), strict=False))
    return whole(loss), whole(parts[1]), [getattr(g, "full_tensor", lambda g=g: g)() for g in gradients]


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    ("mesh_shape", "row_dims", "class_dims"),
    [
        ((4,), None, (0,)),
        ((4,), (None,), (0,)),
        ((4,), (0,), (None,)),
        ((2, 2), (0, None), (None, 0)),
        ((2, 2), (None, 0), (0, None)),
        ((2, 2), (None, None), (None, 0)),
    ],
    ids=str,
)
def test_linear(mesh_shape, row_dims, class_dims, reduction, bias, ranks):
    input, W, b, target, _ = linear_problem((N,), D, K, {})
    loss, parts = linear_self_regularized_entropy(
        input, W, target, linear_bias=b if bias else None, reduction=reduction, return_parts=True
    )
    loss.sum().backward()
    gradients = [leaf.grad for leaf in (input, W, b)[: 2 + bias]]
    for found in ranks.run(4, linear_on_mesh, mesh_shape, row_dims, class_dims, reduction, bias):
        torch.testing.assert_close(found, (loss.detach(), parts[1], gradients), rtol=1e-5, atol=1e-5)


def doubled(module, args, output):
    return 2 * output


def style_of(name):
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    return {
        "columns": ColwiseParallel(),
        "columns, whole logits": ColwiseParallel(output_layouts=Replicate()),
        "columns, DTensor": ColwiseParallel(use_local_output=False),
        "columns, sequence": ColwiseParallel(input_layouts=Shard(0)),
        "rows": RowwiseParallel(input_layouts=Replicate()),
    }[name]


def head_on_mesh(group, name, hook, compiled):
    from torch.distributed.tensor.parallel import parallelize_module

    input, *_, target, _ = linear_problem((N,), D, K, {})
    found = []
    for sharded in (False, True):
        torch.manual_seed(0)
        head, x = LinearSelfRegularizedEntropyLoss(D, K, bias=True), input.detach()
        if sharded:
            parallelize_module(head, mesh_of((4,)), {"linear": style_of(name)})
            x = x.chunk(4)[group.rank()].clone() if "sequence" in name else x
        if hook:
            head.linear.register_forward_hook(doubled)
        x = x.requires_grad_()
        loss = (torch.compile(head, fullgraph=True, backend="aot_eager") if sharded and compiled else head)(x, target)
        loss.backward()
        of_input = x.grad * 1  # waits for a sum over the ranks
        of_input = of_input.chunk(4)[group.rank()] if "sequence" in name and not sharded else of_input
        tensors = loss, head.linear.weight.grad, head.linear.bias.grad
        found.append([of_input, *(whole(tensor) if hasattr(tensor, "placements") else tensor for tensor in tensors)])
    return found


@pytest.mark.parametrize(
    ("name", "hook", "compiled"),
    [
        ("columns", False, False),
        ("columns, whole logits", False, False),
        ("columns, DTensor", False, False),
        ("columns, sequence", False, False),
        ("columns", False, True),
        ("columns", True, False),
        ("columns, whole logits", True, False),
        ("columns, DTensor", True, False),
        ("columns, sequence", True, False),
        ("rows", False, False),
    ],
)
def test_the_head_in_parallelize_module(name, hook, compiled, ranks):
    for alone, sharded in ranks.run(4, head_on_mesh, name, hook, compiled):
        torch.testing.assert_close(sharded, alone)


def in_own_style(_):
    """A style of the user's own, which does more than to lay out."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor

    def partition(_, linear, mesh):
        for name, parameter in list(linear.named_parameters()):
            placed = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
            linear.register_parameter(name, torch.nn.Parameter(placed))

    def place(_, inputs, mesh):
        return (DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False),)

    torch.manual_seed(0)
    head, input, target = LinearSelfRegularizedEntropyLoss(D, K), torch.randn(N, D), torch.randint(K, (N,))
    expected = self_regularized_entropy(2 * head.linear(input), target)
    distribute_module(head.linear, mesh_of((4,)), partition, place, lambda _, logits, mesh: 2 * logits)
    return whole(head(input, target)), expected


def test_a_style_of_the_users_own(ranks):
    for found, expected in ranks.run(4, in_own_style):
        torch.testing.assert_close(found, expected)


def distributed(_):
    from torch.distributed.tensor import Replicate, distribute_module

    line, (logits, target, _) = mesh_of((4,)), problem(N, K, {})
    criterion = distribute_module(SelfRegularizedEntropyLoss(reg_weight=0.0), line)
    head = distribute_module(LinearSelfRegularizedEntropyLoss(D, K, reg_weight=0.0), line)
    assert criterion.reg_weight.placements == (Replicate(),)
    for module in (criterion, head):
        module.reg_weight = torch.tensor(7.0)
        module.reg_weight = 0.5
    weight, features = whole(head.linear.weight), torch.randn(N, D)
    given = placed(features, line, (None,))
    losses = [
        criterion(logits, target),
        whole(criterion(placed(logits, line, (1,)), target)),
        whole(head(given, target)),
    ]
    alone = self_regularized_entropy(logits, target, reg_weight=0.5)
    return losses, [alone, alone, linear_self_regularized_entropy(features, weight, target, reg_weight=0.5)]


def test_distribute_module(ranks):
    for losses, alone in ranks.run(4, distributed):
        torch.testing.assert_close(losses, alone)


# -- what is refused --------------------------------------------------------------------------------------------------


def refused(_):
    from torch.distributed.tensor import DTensor, Partial, Replicate

    messages = []

    def note(function, *args, **options):
        with pytest.raises((ValueError, TypeError)) as raised:
            function(*args, **options)
        messages.append(str(raised.value))

    line, square = mesh_of((4,)), mesh_of((2, 2))
    logits, target, _ = problem(N, K, {})
    weight, features = torch.zeros(K, D), torch.zeros(N, D)
    on_classes = placed(logits, line, (1,))
    partial = DTensor.from_local(logits, line, [Partial()])
    note(self_regularized_entropy, partial, target)
    note(self_regularized_entropy, placed(logits, square, (1, 1)), target)
    note(self_regularized_entropy, on_classes, placed(target, line, (0,)))
    note(self_regularized_entropy, on_classes, placed(target, square, (None, None)))
    note(self_regularized_entropy, on_classes, target, shard=VocabShard.even(K))
    note(self_regularized_entropy, logits, placed(target, line, (None,)))
    note(linear_self_regularized_entropy, features, placed(weight, line, (1,)), target)
    note(linear_self_regularized_entropy, placed(features, line, (0,)), placed(weight, line, (0,)), target)
    note(linear_self_regularized_entropy, placed(features, line, (1,)), placed(weight, line, (None,)), target)
    bias = DTensor.from_local(torch.zeros(K), line, [Replicate()])
    note(linear_self_regularized_entropy, features, placed(weight, line, (0,)), target, linear_bias=bias)
    note(self_regularized_entropy, on_classes, [1])
    note(self_regularized_entropy, on_classes, target.float())
    note(self_regularized_entropy, placed(torch.zeros(N, 3, K), line, (2,)), torch.zeros(N, 3).long())
    one = placed(torch.tensor(1.0), line, (None,))
    note(self_regularized_entropy, on_classes, target, denominator=one)
    note(self_regularized_entropy, logits, target, reg_weight=one)
    note(VocabShard.from_dtensor, placed(logits, line, (None,)))
    note(VocabShard.from_dtensor, placed(logits, square, (1, 1)))
    assert VocabShard.from_dtensor(placed(logits, square, (0, 1))).num_classes == K
    assert VocabShard.from_dtensor(placed(weight, square, (None, 0))).num_classes == K
    return messages


def test_errors_say_what_to_do(ranks):
    of_logits = "input: expected a DTensor that is sharded on rows and, over one dimension of its mesh at most, on "
    of_target = "target: expected a DTensor "
    beginnings = [
        of_logits,
        of_logits,
        of_target + "with placements",
        of_target + "on DeviceMesh",
        "shard: expected None with a DTensor",
        "target: expected a plain tensor",
        "linear_weight: expected a DTensor that is sharded on classes, its dimension 0",
        "input: expected a DTensor on the mesh of linear_weight",
        "input: expected a DTensor on the mesh of linear_weight",
        "linear_bias: expected a DTensor with linear_weight's placements",
        "target: expected a tensor, got [1]; torch.as_tensor makes one",
        "target: expected int64, int32, int16, int8 or uint8 class indices",
        "target: expected class indices of shape (8, 61) or probabilities of shape (8, 3, 61), got an int64 tensor of "
        "shape (8, 3); dimension 1 of the logits is the classes",
        "denominator: expected a plain tensor, got a DTensor; denominator.full_tensor() is one",
        "reg_weight: expected a plain tensor, got a DTensor; reg_weight.full_tensor() is one",
        "tensor: expected a DTensor that is sharded on classes over one dimension",
        "tensor: expected a DTensor that is sharded on classes over one dimension",
    ]
    messages = ranks.run(4, refused)[0]
    for message, beginning in zip(messages, beginnings, strict=True):
        assert message.startswith(beginning)
    assert messages[0].endswith("got placements (Partial(sum),); use input.redistribute(placements=...)")
