"""The primitives as PyTorch sees them: one signature, one fake, one batching rule each, whoever computes them.

A row of logits becomes a few statistics, which combine across shards, then its gradient is an elementwise pass:

    row_lse                 z -> the first five of its statistics
    row_sums                z, those five -> the other two
    row_gradient            z, all seven -> the gradient
    row_loss                row_lse + row_sums -> losses, statistics               one read
    row_loss_and_gradient   row_lse + row_sums + row_gradient -> losses, gradient  one read, one write

A backend writes the five as Python functions on plain tensors and decorates each with :func:`primitive`. In ordinary
eager code the function is then called as it is; inside ``torch.compile``, ``torch.export``, a ``torch.func``
transform or a dispatch mode it is the registered op, with the fakes and the batching rule below. The gradient is then
that of autograd.py's Functions around both, but a program of ``torch.export`` has the ops alone: each that returns
losses has a formula of its own.

STATS, (7, N): m = max z, exp_sum = Σ exp(z - m), y_sum = Σ w y, yz_sum = Σ w y (z - m), omega (the sample's weight),
h_sum = Σ (1 - y) h, u_sum = Σ (1 - y) u, all sums over the classes and y the smoothed target distribution. (The sum of
exponentials and not its logarithm: one rounding of that, up to 5e-7, moves t = log(p / c) for all classes alike.)
LOSSES, (4, N): loss, H, S, α lse² of each row, weighted by omega, before ``reg_weight`` and any division.
"""

import functools
import importlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from .internals import hidden_from_modes, in_forward_mode, is_batched, is_watched
from .messages import DOUBLE_BACKWARD, FORWARD_AD, OTHER_GRADIENTS
from .reference import compute_dtype

# The module of each backend's functions. It is loaded when one is called, but the ops are there before, for programs
# that torch.export.load brings.
MODULES = {"compile": "compiled.primitives", "triton": "kernels.primitives"}

NUM_LSE, NUM_SUMS, NUM_LOSSES = 5, 2, 4
NUM_STATS = NUM_LSE + NUM_SUMS

# The dimension of the rows in each argument that has one.
ROW_DIM = {"logits": 0, "target": 0, "scale": 0, "stats": 1}


class RowOptions(NamedTuple):
    """The last argument of all primitives: what a row's loss depends on beside the tensors among the arguments.

    In eager code c, λ', ε, α and the softcap are Python numbers, but λ' may be a tensor, (). While compiling all five
    are tensors, as torch.compile would compile numbers in. An option that is not in use is None.
    """

    c: float | Tensor
    reg_weight: float | Tensor  # λ'
    ignore_index: int
    label_smoothing: float | Tensor | None = None
    z_loss: float | Tensor | None = None
    softcap: float | Tensor | None = None
    # Of sharded classes: the first of these logits, and K, of all shards. A target that is no class of these logits is
    # then another shard's.
    first_class: int = 0
    all_classes: int | None = None
    compile_now: bool = False  # do not wait until it pays to compile (compiled/inductor.py)


# The same, as the registered ops take it: one argument for each.
OPTIONS = (
    "Tensor c, Tensor reg_weight, SymInt ignore_index, Tensor? label_smoothing, Tensor? z_loss, Tensor? softcap, "
    "int first_class=0, SymInt? all_classes=None, "
    "bool compile_now=False"
)
NUM_OPTIONS = len(RowOptions._fields)


def new_per_row(logits: Tensor, count: int) -> Tensor:
    """Values of the rows, (count, N), not yet written."""
    return logits.new_empty(count, logits.shape[0], dtype=compute_dtype(logits.dtype))


def new_gradient(logits: Tensor) -> Tensor:
    """(N, K), contiguous, not yet written."""
    return logits.new_empty(logits.shape)


class Primitive(NamedTuple):
    """What PyTorch must know of a primitive."""

    # logits (N, K); target (N,) or (N, K); weight (K,); stats; scale (N,), factors of the gradient: to a backend's
    # function it may come as one factor, ()
    arguments: str
    fake: Callable  # the outputs, given the logits
    row_dims: tuple[int, ...]  # the dimension of the rows in each output

    def num_tensors(self) -> int:
        """How many arguments come before the options."""
        return self.arguments.count(",") + 1

    def schema(self) -> str:
        """As PyTorch writes it."""
        outputs = ", ".join(["Tensor"] * len(self.row_dims))
        return f"({self.arguments}, {OPTIONS}) -> ({outputs})"


PRIMITIVES = {
    "row_lse": Primitive(
        "Tensor logits, Tensor target, Tensor? weight",
        lambda z: new_per_row(z, NUM_LSE),
        (1,),
    ),
    "row_sums": Primitive(
        "Tensor logits, Tensor target, Tensor stats",
        lambda z: new_per_row(z, NUM_SUMS),
        (1,),
    ),
    "row_gradient": Primitive(
        "Tensor logits, Tensor target, Tensor? weight, Tensor stats, Tensor scale",
        new_gradient,
        (0,),
    ),
    "row_loss": Primitive(
        "Tensor logits, Tensor target, Tensor? weight",
        lambda z: (new_per_row(z, NUM_LOSSES), new_per_row(z, NUM_STATS)),
        (1, 1),
    ),
    "row_loss_and_gradient": Primitive(
        "Tensor logits, Tensor target, Tensor? weight, Tensor scale",
        lambda z: (new_per_row(z, NUM_LOSSES), new_gradient(z)),
        (1, 0),
    ),
}


def needs_dispatch(logits: Tensor, args: Iterable[object]) -> bool:
    """Whether the call must pass PyTorch's dispatcher: for a watcher, or for tensors that are not plain."""
    plain = type(logits) in (Tensor, torch.nn.Parameter) and not logits.is_meta
    return not plain or is_watched() or any(map(is_batched, args))


def value_on_cpu(number: float | Tensor) -> float | Tensor:
    """A number that lies on the CPU is read: nothing is waited for, and operations on it would take 10 us."""
    if isinstance(number, Tensor) and number.is_cpu and not needs_dispatch(number, (number,)):
        return number.item()
    return number


def as_tensors(options: RowOptions) -> list[Tensor | int | None]:
    """The options as the registered ops take them."""
    return [
        torch.tensor(option, dtype=torch.float64, device="cpu") if isinstance(option, float) else option
        for option in options
    ]


def kept_options(ctx: Any, options: RowOptions) -> list[Tensor | None]:
    """The scalars among the options that are tensors, to be saved; the ctx keeps the others."""
    ctx.options = tuple(None if isinstance(option, Tensor) else option for option in options)
    return [option if isinstance(option, Tensor) else None for option in options]


def options_again(ctx: Any, saved: list[Tensor | None]) -> RowOptions:
    """The options, from what was saved of them."""
    return RowOptions(
        *(option if tensor is None else tensor for tensor, option in zip(saved, ctx.options, strict=True))
    )


def names_in(schema: str) -> list[str]:
    """The arguments' names: ["logits", "first_class"] of "(Tensor logits, int first_class=0) -> Tensor"."""
    arguments, _, _ = schema.strip("(").partition(")")
    return [argument.partition("=")[0].split()[-1] for argument in arguments.split(",")]


def batching_rule(op: Callable, schema: str, out_row_dims: tuple[int, ...]) -> Callable:
    """Rows do not know of each other, so a batch of calls is one call with more rows."""
    all_names = names_in(schema)

    def rule(info, in_dims, *args):
        """The outputs of all calls, and where their batch dimension is; `in_dims` says so of the arguments.

        Where more than rows is batched, such as class weights, there are as many calls.
        """
        batch = info.batch_size
        names = all_names[: len(args)]
        batched = [arg if dim is None else arg.movedim(dim, 0) for arg, dim in zip(args, in_dims, strict=True)]
        if any(dim is not None and name not in ROW_DIM for name, dim in zip(names, in_dims, strict=True)):
            calls = [
                op(*(arg if dim is None else arg[i] for arg, dim in zip(batched, in_dims, strict=True)))
                for i in range(batch)
            ]
            if isinstance(calls[0], Tensor):
                return torch.stack(calls), 0
            return tuple(torch.stack(outs) for outs in zip(*calls, strict=True)), (0,) * len(out_row_dims)
        folded = []
        for name, arg, dim in zip(names, batched, in_dims, strict=True):
            if name in ROW_DIM:
                row_dim = ROW_DIM[name]
                arg = arg.expand(batch, *arg.shape) if dim is None else arg
                arg = arg.movedim(0, row_dim).flatten(row_dim, row_dim + 1)
            folded.append(arg)
        outs = op(*folded)
        single = isinstance(outs, Tensor)
        unfolded = tuple(
            out.unflatten(dim, (batch, out.shape[dim] // batch))
            for out, dim in zip((outs,) if single else outs, out_row_dims, strict=True)
        )
        return (unfolded[0], out_row_dims[0]) if single else (unfolded, out_row_dims)

    return rule


def without_forward_ad(function: Callable) -> Callable:
    """What an op computes. In forward mode, which PyTorch does not show to an op, its derivative would be 0."""

    @functools.wraps(function)
    def compute(*args):
        """The function, but in forward mode an error."""
        if in_forward_mode():
            raise NotImplementedError(FORWARD_AD)
        return function(*args)

    return compute


def no_second_derivative(ctx: Any, *_: Tensor | None) -> NoReturn:
    """The formula of an op that returns gradients."""
    raise RuntimeError(DOUBLE_BACKWARD)


def register_formula(op: Callable, backend_of: Callable[[tuple], str], with_stats: bool) -> None:
    """The gradient of losses, of an op whose arguments begin and end as row_loss's do.

    Args:
        op: what ``torch.library.custom_op`` returned. It returns the losses first.
        backend_of: the backend, given the arguments.
        with_stats: whether it returns the statistics next; else a gradient.
    """

    def setup_context(ctx, inputs, output):
        """Keep the arguments, and the statistics where they are there."""
        if any(ctx.needs_input_grad[1:3]):
            raise ValueError(OTHER_GRADIENTS)
        stats = output[1] if with_stats else None
        if with_stats:
            ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        ctx.backend = backend_of(inputs)
        ctx.save_for_backward(*inputs[:3], stats, *kept_options(ctx, RowOptions(*inputs[-NUM_OPTIONS:])))

    def backward(ctx, grad_losses, grad_gradient):
        """The gradient of Σ grad_losses[0] * loss, by row_gradient."""
        if grad_gradient is not None:
            raise RuntimeError(DOUBLE_BACKWARD)
        logits, target, weight, stats, *saved = ctx.saved_tensors
        options = options_again(ctx, saved)
        if stats is None:
            _, stats = OPS[ctx.backend, "row_loss"](logits, target, weight, *options)
        # The other losses are the parts, through which no gradient flows.
        gradient = OPS[ctx.backend, "row_gradient"](logits, target, weight, stats, grad_losses[0], *options)
        return gradient, *(None,) * (len(ctx.needs_input_grad) - 1)

    op.register_autograd(backward, setup_context=setup_context)


def _register(backend: str, name: str) -> Callable:
    """The op ``sre_triton::<backend>_<name>``."""
    primitive = PRIMITIVES[name]
    num_tensors = primitive.num_tensors()

    @without_forward_ad
    @hidden_from_modes
    def contiguous(*args):
        """The backend's function on plain tensors; what it returns is contiguous, as the fake says."""
        importlib.import_module(f".{MODULES[backend]}", __package__)
        outs = _functions[backend, name](*args[:num_tensors], RowOptions(*args[num_tensors:]))
        return outs.contiguous() if isinstance(outs, Tensor) else tuple(out.contiguous() for out in outs)

    op = torch.library.custom_op(
        f"sre_triton::{backend}_{name}", contiguous, mutates_args=(), schema=primitive.schema()
    )
    op.register_fake(lambda logits, *_: primitive.fake(logits))
    op.register_vmap(batching_rule(op, primitive.schema(), primitive.row_dims))
    if name in ("row_loss", "row_loss_and_gradient"):
        register_formula(op, lambda _: backend, with_stats=name == "row_loss")
    if name == "row_gradient":
        op.register_autograd(no_second_derivative)
    return op


OPS: dict[tuple[str, str], Callable[..., Any]] = {
    (backend, name): _register(backend, name) for backend in MODULES for name in PRIMITIVES
}
_functions: dict[tuple[str, str], Callable] = {}


def primitive(backend: str) -> Callable[[Callable], Callable]:
    """Make a backend's function of one of the five names what its op computes, and itself call the op if it must."""

    def register(function: Callable) -> Callable:
        """The function, for calls that need no dispatch, and the op for all others."""
        name = function.__name__
        op, takes_scale = OPS[backend, name], PRIMITIVES[name].arguments.endswith("scale")
        _functions[backend, name] = function

        @functools.wraps(function)
        def call(logits: Tensor, *args):
            """Whichever of the two the arguments ask for."""
            *tensors, options = args
            if not needs_dispatch(logits, tensors):
                return function(logits, *args)
            if takes_scale and tensors[-1].dim() == 0:
                tensors[-1] = tensors[-1].expand(logits.shape[0])
            return op(logits, *tensors, *as_tensors(options))

        call.op, call.function = op, function
        return call

    return register
