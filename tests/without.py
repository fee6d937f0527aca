"""A server that removes a private name of PyTorch, imports the package without it and tries the loss.

It reads names from its input, a line each ("torch._C:_get_tracing_state"), and answers each with a line: "right", or
what went wrong. PyTorch is imported once; each name has a process of its own, forked before the package is imported.
"""

import contextlib
import os
import pkgutil
import sys
import traceback
import warnings

import pytest
import torch
import torch._dynamo
import torch._inductor.compile_fx
import torch.distributed as dist
import torch.fx.experimental.symbolic_shapes
import torch.utils.flop_counter
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

STANCES = ("force_eager", "eager_on_recompile", "fail_on_recompile")
MARK = "torch._dynamo:_dynamo_marked_constant"  # not a name in a module, but an attribute of the package's functions


class Watching(TorchDispatchMode):
    """Looks on."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Looking(TorchFunctionMode):
    """Looks on, too."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def removed(path):
    """While the package looks for it, the name is gone; PyTorch itself has it back afterwards."""
    module, name = path.split(":")
    places = [f"{module}:{name}"]
    if "." in name:
        places.append(f"{module}:{name.split('.')[0]}")
    for place in places:
        holder, _, last = place.replace(":", ".").rpartition(".")
        holder = pkgutil.resolve_name(f"{module}:{holder.removeprefix(module).lstrip('.')}")
        value = getattr(holder, last)
        try:
            delattr(holder, last)
        except (AttributeError, TypeError):
            continue
        try:
            pkgutil.resolve_name(path)
        except (AttributeError, ImportError):
            break
        setattr(holder, last, value)
    else:
        raise ValueError(f"{path} cannot be removed")
    try:
        yield
    finally:
        setattr(holder, last, value)


def found_without(path):
    """The package, imported while a name is gone."""
    if path == MARK:
        import sre_triton  # noqa: F401

        rooms = [room for name, room in sys.modules.items() if name.startswith("sre_triton.")]
        marked = {id(f): f for room in rooms for f in vars(room).values() if hasattr(f, "_dynamo_marked_constant")}
        assert len(marked) == 4, marked
        for function in marked.values():
            del function._dynamo_marked_constant
        return
    with removed(path):
        from sre_triton import internals

        assert internals.find(path) is None


def close(found, expected, tolerance=1e-4):
    torch.testing.assert_close(found.detach().double(), expected.detach().double(), rtol=tolerance, atol=1e-6)


class Case:
    """Logits of 6 rows and 20 classes, and the truth in float64."""

    def __init__(self):
        from sre_triton import reference

        generator = torch.Generator().manual_seed(0)
        self.z = torch.randn(6, 20, generator=generator) * 3
        self.target = torch.arange(6)
        wide = self.z.double().requires_grad_()
        self.loss, _ = reference.self_regularized_entropy(wide, self.target, z_loss=0.1)
        (self.gradient,) = torch.autograd.grad(self.loss, wide)

    def of_logits(self, z, **keywords):
        from sre_triton import self_regularized_entropy

        return self_regularized_entropy(z, self.target, z_loss=0.1, **keywords)

    def of_layer(self, weight, **keywords):
        from sre_triton import linear_self_regularized_entropy

        return linear_self_regularized_entropy(torch.eye(6), weight, self.target, z_loss=0.1, **keywords)

    def module(self, divisor):
        from sre_triton import LinearSelfRegularizedEntropyLoss

        module = LinearSelfRegularizedEntropyLoss(6, 20, bias=False, z_loss=0.1)
        module.linear.weight.data = self.z.t() / divisor
        return module

    def check(self, loss, leaf, gradient=None):
        """The loss and the gradient are the truth."""
        close(loss, self.loss, 5e-6)
        found = torch.autograd.grad(loss, leaf)[0] if gradient is None else gradient
        close(found, self.gradient if leaf.shape == self.gradient.shape else self.gradient.t())

    def step(self, **keywords):
        """Both public functions."""
        leaf = self.z.clone().requires_grad_()
        self.check(self.of_logits(leaf, **keywords), leaf)
        self.check(self.of_logits(leaf * 1, inplace=True, **keywords), leaf)
        weight = self.z.t().contiguous().requires_grad_()
        self.check(self.of_layer(weight, **keywords), weight)


def plain(case):
    case.step()
    case.step(reg_weight=torch.tensor(1.0))
    with torch.no_grad():
        close(case.of_logits(case.z), case.loss, 5e-6)
    module = case.module(1)
    case.check(module(torch.eye(6), case.target), module.linear.weight)


def watched(case):
    for mode in (Watching, Looking, lambda: torch.device("cpu")):
        with mode():
            case.step()


def dispatched(case):
    """A tracer sees the registered op."""
    graph = make_fx(lambda z: case.of_logits(z))(case.z)
    assert "sre_triton" in graph.code
    close(graph(case.z), case.loss, 5e-6)


def multiplied(case):
    """A weight of a class that does more than a tensor."""
    from sre_triton import internals

    assert not internals.without_torch_function(torch.Tensor)


def transformed(case):
    case.check(case.loss, case.z, torch.func.grad(case.of_logits)(case.z))
    weight = case.z.t().contiguous()
    case.check(case.loss, weight, torch.func.grad(case.of_layer)(weight))
    both = torch.func.vmap(torch.func.grad(case.of_logits))(torch.stack([case.z, case.z * 1]))
    case.check(case.loss, case.z, both[1])
    with pytest.raises((NotImplementedError, RuntimeError), match="forward"):  # not a derivative of 0
        torch.func.jvp(case.of_logits, (case.z,), (case.z,))


def dual(case):
    """An op, which would have a derivative of 0 in forward mode, raises there and nowhere else."""
    from sre_triton.primitives import OPS, as_tensors

    args = case.z, case.target, None, *as_tensors((1e-7, 1.0, -100, None, 0.1, None))
    losses, _ = OPS["compile", "row_loss"](*args)
    close(losses[0].mean(), case.loss, 5e-6)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward"):
        OPS["compile", "row_loss"](*args)


def batched(case):
    leaf = case.z.clone().requires_grad_()
    for loss in (case.of_logits(leaf, recompute=True), case.of_logits(leaf)):
        (gradients,) = torch.autograd.grad(loss, leaf, torch.tensor([1.0, 2.0]), is_grads_batched=True)
        close(gradients[0], case.gradient)
        close(gradients[1], 2 * case.gradient)


def traced(case):
    """Within the user's torch.compile."""
    torch._dynamo.reset()
    leaf = case.z.clone().requires_grad_()
    case.check(torch.compile(case.of_logits, backend="aot_eager")(leaf), leaf)


def traced_in_a_mode(case):
    torch._dynamo.reset()
    found = torch.compile(lambda z: case.of_logits(z), backend="eager", fullgraph=True)
    with Looking():
        close(found(case.z), case.loss, 5e-6)


def traced_with_a_transform(case):
    torch._dynamo.reset()
    gradient = torch.compile(lambda z: torch.func.grad(case.of_logits)(z), backend="eager")(case.z)
    case.check(case.loss, case.z, gradient)


def guarded(case):
    """Numbers that are known while tracing, and one that a graph computes."""
    from sre_triton.internals import may_hold

    torch._dynamo.reset()
    found = torch.compile(lambda x, a: x + 1 if may_hold(a > 2) else x, backend="eager", dynamic=True)
    assert found(case.z[0, 0], 3.0) == case.z[0, 0] + 1
    assert found(case.z[0, 0], 1.0) == case.z[0, 0]
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        found = torch.compile(lambda x: x + 1 if may_hold(x.item() > 2) else x, backend="eager")
        assert found(torch.tensor(3.0)) == 4


def exported(case):
    class Loss(torch.nn.Module):
        def forward(self, z):
            return case.of_logits(z, return_parts=True)

    loss, _ = torch.export.export(Loss(), (case.z,)).module()(case.z)
    close(loss, case.loss, 5e-6)


def switched(case):
    """The package's own compilation of the loss, and what switches it off."""
    compiled(case, switches=True)


def pretended(case):
    """What switches it off, where compiling takes no time."""
    from sre_triton.compiled import inductor

    inductor._compile = lambda function, args: lambda args: function(*args)
    compiled(case, switches=True)


def compiled(case, switches=False):
    """The same, of the gradient too."""
    from sre_triton.compiled import inductor, waiting

    inductor._uncompiled.clear()
    waiting.MANY = 0  # compile at the first call
    leaf = case.z.clone().requires_grad_()

    def step():
        close(case.of_logits(case.z), case.loss, 5e-6)
        if switches:
            return
        case.check(case.of_logits(leaf), leaf)

    for stance in STANCES:
        with torch.compiler.set_stance(stance):
            step()
    assert not inductor._compiled, "compiled while that is switched off"
    graph = make_fx(lambda z: case.of_logits(z))(case.z)
    assert not inductor._compiled, "compiled while make_fx traces"
    step()
    assert len(inductor._compiled) == (1 if switches else 2)
    assert all(inductor._compiled.values()), "a compilation has failed"
    make_fx(lambda z: case.of_logits(z))(case.z)
    close(graph(case.z), case.loss, 5e-6)
    for stance in STANCES:
        with torch.compiler.set_stance(stance):
            step()


def sharded(case):
    from sre_triton import VocabShard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for group in (None, dist.new_group([0])):
        assert group is None or VocabShard(0, 20, 20, group).group is group
        leaf = case.z.clone().requires_grad_()
        case.check(case.of_logits(leaf, shard=VocabShard(0, 20, 20, group)), leaf)
    dist.destroy_process_group()


def hooked(case):
    """A layer of a module with global hooks, which double what it returns."""
    module = case.module(2)
    twice = lambda layer, inputs, output: output * 2 if layer is module.linear else None  # noqa: E731
    handle = torch.nn.modules.module.register_module_forward_hook(twice)
    loss = module(torch.eye(6), case.target)
    handle.remove()
    close(loss, case.loss, 5e-6)


def handed_over(case):
    """A backward for one gradient after another."""
    input, weight = torch.eye(6, requires_grad=True), case.z.t().contiguous().requires_grad_()
    from sre_triton import internals, linear_self_regularized_entropy

    loss = linear_self_regularized_entropy(input, weight, case.target, z_loss=0.1)
    (of_weight,) = torch.autograd.grad(loss, weight, retain_graph=True)
    case.check(case.loss, weight, of_weight)
    assert internals.will_execute(loss.grad_fn)


def checks_of(path):
    """What is tried without a name: a step always, and whatever the name is about."""
    about = {
        "_are_functorch_transforms_active": [watched, transformed, traced, traced_with_a_transform],
        "_len_torch_dispatch_stack": [watched, dispatched, transformed],
        "_current_level": [dual, watched, transformed, traced],
        "is_legacy_batchedtensor": [batched],
        "torch_function": [watched],
        "_len_torch_function_stack": [traced],
        "DisableTorchFunction": [watched, traced_in_a_mode],
        "_disabled_torch_function_impl": [multiplied],
        "_will_engine": [handed_over],
        "_register_namedtuple": [exported],
        "_global": [hooked],
        "_process_group": [sharded],
        "guard_or_true": [guarded],
        "_dynamo_marked": [traced],
        "_stance": [switched],
        "_dynamo.config": [pretended],
        "_functorch.config": [compiled],
        "_inductor.compile_fx": [compiled],
        "_inductor:": [switched],
        "fx._symbolic": [pretended],
    }
    chosen = [check for part, checks in about.items() if part in path for check in checks]
    return [plain, *dict.fromkeys(chosen)]


def tried(path):
    """One name, in a process of its own."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found_without(path)
    from sre_triton.compiled import inductor

    inductor._uncompiled.add("cpu")  # compiling takes seconds, and most names are not about it
    case = Case()
    for check in checks_of(path):
        check(case)


def main():
    for line in sys.stdin:
        path = line.strip()
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            try:
                tried(path)
                answer = "right"
            except BaseException:
                answer = repr(traceback.format_exc())
            os.write(1, f"{answer}\n".encode())
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            os.write(1, b"the process died\n")


if __name__ == "__main__":
    main()
