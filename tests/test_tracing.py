"""What others make of a model with the loss: exported programs, scripts, traces, derivatives in forward mode."""

import copy
import io
import subprocess
import sys

import pytest
import torch
from helpers import OPTIONS, problem, truth
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from sre_triton import (
    LinearSelfRegularizedEntropyLoss,
    Parts,
    SelfRegularizedEntropyLoss,
    linear_self_regularized_entropy,
    self_regularized_entropy,
)

N, D, K = 6, 5, 20
CLOSE = {"rtol": 1e-4, "atol": 1e-6}

# Tracers' own warnings: of torch.jit from torch 2.14 on, of decompositions and torch.export.load in 2.11.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.*(deprecated|not supported in Python)"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.*deprecated"),
    pytest.mark.filterwarnings("ignore:The given buffer is not writable"),
]
heads = pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])


class Model(nn.Module):
    """Features, logits, loss; the last two in one where they are fused."""

    def __init__(self, fused, **options):
        super().__init__()
        self.body = nn.Linear(D, 4)
        self.fused = fused
        if fused:
            self.criterion = LinearSelfRegularizedEntropyLoss(4, K, bias=True, **options)
        else:
            self.head, self.criterion = nn.Linear(4, K), SelfRegularizedEntropyLoss(**options)

    def logits(self, x):
        head = self.criterion.linear if self.fused else self.head
        return head(self.body(x).tanh())

    def forward(self, x, y):
        features = self.body(x).tanh()
        return self.criterion(features if self.fused else self.head(features), y)


def batch(rows=N, probabilities=False, seed=1):
    _, y, _ = problem(rows, K, {}, probabilities=probabilities, seed=seed)
    x = torch.randn(rows, D, generator=torch.Generator().manual_seed(seed))
    if not probabilities:
        y[0] = -100
    return x, y


def gradients(loss, module):
    upstream = torch.linspace(-1, 2, loss.numel()).reshape(loss.shape)
    names, parameters = zip(*module.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, upstream), strict=True))


def true_gradients(model, x, y, **options):
    """In float64, by the definition."""
    wide = copy.deepcopy(model).double()
    logits = wide.logits(x.double())
    upstream = torch.linspace(-1, 2, N if options.get("reduction") == "none" else 1).squeeze()
    loss, _, gradient = truth(logits.detach(), y, upstream=upstream, **options)
    names, parameters = zip(*wide.named_parameters(), strict=True)
    return loss, dict(zip(names, torch.autograd.grad(logits, parameters, gradient), strict=True))


def assert_trains(program, model, x, y, **options):
    """Loss and gradients of an exported program are the truth."""
    result = program(x, y)
    loss = result if isinstance(result, torch.Tensor) else result[0]
    true_loss, expected = true_gradients(model, x, y, **options)
    torch.testing.assert_close(loss.detach().double(), true_loss, **CLOSE)
    found = gradients(loss, program)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name].double(), gradient, **CLOSE)


# -- torch.export -----------------------------------------------------------------------------------------------------


@heads
@pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("how", [{}, {"reduction": "sum"}, {"reduction": "none"}], ids=str)
def test_an_exported_program_trains(how, probabilities, fused, row_backend):
    options = problem(1, K, OPTIONS["all"])[2] | how
    model = Model(fused, backend=row_backend, return_parts=True, **options)
    program = torch.export.export(model, batch(probabilities=probabilities)).module()
    x, y = batch(probabilities=probabilities, seed=2)
    assert_trains(program, model, x, y, **options)
    loss, parts = program(x, y)
    assert isinstance(parts, Parts)
    assert not any(part.requires_grad for part in parts)
    torch.testing.assert_close(loss, parts.cross_entropy - 0.7 * parts.regularizer + parts.z_loss, **CLOSE)


def decomposed(model, *args, **how):
    return torch.export.export(model, *args, **how).run_decompositions().module()


def strict(model, *args, **how):
    return torch.export.export(model, *args, strict=True, **how).module()


def under_no_grad(model, *args, **how):
    with torch.no_grad():
        return torch.export.export(model, *args, **how).module()


def saved(model, *args, **how):
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, *args, **how), file)
    file.seek(0)
    return torch.export.load(file).module()


def compiled_again(model, *args, **how):
    program = torch.export.export(model, *args, **how).module()
    program.forward = torch.compile(program.forward, fullgraph=True, backend="aot_eager")
    return program


@heads
@pytest.mark.parametrize("export", [decomposed, strict, under_no_grad, saved, compiled_again])
def test_ways_to_export(export, fused, uncompiled):
    model = Model(fused, return_parts=True)
    rows = {0: torch.export.Dim("rows", min=2)}
    program = export(model, batch(3), dynamic_shapes=(rows, rows))
    program.get_buffer("criterion.reg_weight").fill_(0.4)
    x, y = batch()
    assert_trains(program, model, x, y, reg_weight=0.4)
    _, parts = program(x, y)
    if parts.regularizer.requires_grad:  # decompositions drop detach()
        assert not torch.autograd.grad(parts.regularizer, program.parameters(), allow_unused=True)[0].any()


@heads
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_an_exported_program_in_half_precision(dtype, fused, row_backend):
    model = Model(fused, backend=row_backend).to(dtype)
    x, y = batch()
    program = torch.export.export(model, (x.to(dtype), y)).module()
    found = gradients(1024 * program(x.to(dtype), y), program)
    expected = gradients(1024 * model(x.to(dtype), y), model)
    for name, gradient in expected.items():
        assert found[name].dtype == dtype
        torch.testing.assert_close(found[name], gradient, rtol=2e-2, atol=torch.finfo(dtype).eps * 2048)


@heads
def test_an_exported_program_gives_a_gradient_twice_but_not_of_it(fused, uncompiled):
    x, y = batch()
    program = torch.export.export(Model(fused), (x, y)).module()
    loss, weight = program(x, y), program.get_parameter("body.weight")
    (once,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (again,) = torch.autograd.grad(loss, weight, create_graph=True)
    torch.testing.assert_close(once, again)
    with pytest.raises(RuntimeError, match="backend='eager'"):
        again.square().sum().backward()


@heads
def test_an_exported_program_refuses_what_it_has_no_gradient_of(fused, uncompiled):
    x, y = batch(probabilities=True)
    program = torch.export.export(Model(fused), (x, y)).module()
    with pytest.raises(ValueError, match="'eager' when a program is exported whose target"):
        program(x, y.requires_grad_())
    parameters = dict(program.named_parameters())
    tangents = {name: torch.ones_like(parameter) for name, parameter in parameters.items()}
    with pytest.raises(NotImplementedError, match="backend='eager'"):
        torch.func.jvp(lambda p: torch.func.functional_call(program, p, (x, y.detach())), (parameters,), (tangents,))


@heads
def test_compiled_code_keeps_the_single_pass(fused, uncompiled):
    graphs = []

    def keep(graph, inputs):
        graphs.append(str(graph.graph))
        return make_boxed_func(graph.forward)

    compiler = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    torch.compile(Model(fused), backend=compiler, fullgraph=True)(*batch()).backward()
    # The backward multiplies by the upstream gradient, and computes nothing of the loss again.
    assert ["sre_triton" in graph for graph in graphs] == [True, False]


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a CPU, in Triton's interpreter")
def test_a_program_with_kernels_is_loaded_in_another_process(tmp_path):
    x, y = batch()
    model = Model(fused=False, backend="triton")
    torch.export.save(torch.export.export(model, (x, y)), tmp_path / "program.pt2")
    torch.save((x, y), tmp_path / "batch.pt")
    code = (
        "import sys, torch, sre_triton; program = torch.export.load('program.pt2').module(); "
        "assert 'sre_triton.kernels.launch' not in sys.modules; program(*torch.load('batch.pt')).backward(); "
        "torch.save({name: parameter.grad for name, parameter in program.named_parameters()}, 'gradients.pt')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    for name, expected in gradients(-model(x, y), model).items():
        torch.testing.assert_close(torch.load(tmp_path / "gradients.pt")[name], expected)


def test_export_for_evaluation(uncompiled):
    class EvaluationStep(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.criterion = nn.Linear(8, 20), SelfRegularizedEntropyLoss(return_parts=True)

        def forward(self, x, y):
            logits = self.model(x)
            return logits.argmax(1), *self.criterion(logits, y)

    step, rows = EvaluationStep().eval(), {0: torch.export.Dim("rows")}
    program = torch.export.export(step, (torch.randn(6, 8), torch.arange(6)), dynamic_shapes=(rows, rows))
    for count in (6, 11):
        x, y = torch.randn(count, 8), torch.arange(count)
        torch.testing.assert_close(program.module()(x, y), step(x, y))


# -- TorchScript ------------------------------------------------------------------------------------------------------


class Predicts(Model):
    def __init__(self, fused, **options):
        super().__init__(fused, **options)
        self.layers = nn.Sequential(self.body, nn.Tanh(), self.criterion.linear if fused else self.head)

    def forward(self, x):
        return self.layers(x)


class MayTrain(Predicts):
    def forward(self, x, y: torch.Tensor | None = None):
        logits = self.layers(x)
        return logits if y is None else self.criterion(logits, y)


@heads
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "class_mean": True, "denominator": 3.0, "weight": True}])
@pytest.mark.parametrize("make", [Predicts, MayTrain])
def test_a_model_that_holds_the_loss_is_scripted(make, options, fused):
    model = make(fused, **problem(1, K, options)[2])
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    script, (x, y) = torch.jit.load(file), batch()
    assert torch.equal(script(x), model(x))
    assert torch.equal(torch.jit.trace(model, x)(x), model(x))
    if make is MayTrain:
        with pytest.raises(torch.jit.Error, match="annotated to be ignored and cannot be run"):
            script(x, y)


# -- torch.jit.trace, symbolic tracing --------------------------------------------------------------------------------


@heads
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_torch_jit_trace_names_eager_which_works(fused, row_backend):
    for backend in (None, row_backend):
        with pytest.raises(RuntimeError, match="torch.jit.trace .* backend='eager'"):
            torch.jit.trace(Model(fused, backend=backend), batch(3))
    model = Model(fused, backend="eager")
    assert_trains(torch.jit.trace(model, batch(3)), model, *batch())


@heads
def test_symbolic_tracing_names_what_works(fused, monkeypatch, uncompiled):
    model, (x, y) = Model(fused), batch()
    for backend in (None, "eager"):
        model.criterion.backend = backend
        with pytest.raises(TypeError, match="torch.fx.wrap .* is_leaf_module .* torch.export"):
            torch.fx.symbolic_trace(model)

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return module is model.criterion or super().is_leaf_module(module, name)

    assert_trains(torch.fx.GraphModule(model, Tracer().trace(model)), model, x, y)
    monkeypatch.setattr(torch.fx._symbolic_trace, "_wrapped_fns_to_patch", {})
    name = "linear_self_regularized_entropy" if fused else "self_regularized_entropy"
    torch.fx._symbolic_trace._wrapped_fns_to_patch[id(globals()), name] = globals()

    def loss(z, W, y):
        return linear_self_regularized_entropy(z, W, y) if fused else self_regularized_entropy(z @ W.t(), y)

    z, W = torch.randn(N, D), torch.randn(K, D)
    torch.testing.assert_close(torch.fx.symbolic_trace(loss)(z, W, y), loss(z, W, y))


# -- derivatives in forward mode --------------------------------------------------------------------------------------


def dual(loss, x):
    with torch.autograd.forward_ad.dual_level():
        return torch.autograd.forward_ad.unpack_dual(loss(torch.autograd.forward_ad.make_dual(x, x))).tangent


def linearized(loss, x):
    return torch.func.linearize(loss, x)[1](x)


def jvp(loss, x):
    return torch.func.jvp(loss, (x,), (x,))[1]


def jvp_of_gradient(loss, x):
    return torch.func.jvp(torch.func.grad(loss), (x,), (x,))[1]


FORWARD = {
    "jvp": jvp,
    "jacfwd": lambda loss, x: torch.func.jacfwd(loss)(x),
    "linearize": linearized,
    "dual": dual,
    "hessian": lambda loss, x: torch.func.hessian(loss)(x),
    "jvp of grad": jvp_of_gradient,
}


@heads
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr")  # by linearize itself
@pytest.mark.parametrize("derivative", FORWARD.values(), ids=FORWARD)
def test_forward_mode_names_eager_which_works(derivative, fused, row_backend):
    W, (x, y) = torch.randn(K, D), batch(3)

    def loss(backend):
        if fused:
            return lambda x: linear_self_regularized_entropy(x, W.to(x.dtype), y, backend=backend)
        return lambda x: self_regularized_entropy(x @ W.t().to(x.dtype), y, backend=backend)

    for backend in (None, row_backend):
        with pytest.raises(NotImplementedError, match="forward mode .* backend='eager'"):
            derivative(loss(backend), x)
    found, wide, eager = derivative(loss("eager"), x), x.double().requires_grad_(), loss("eager")
    (gradient,) = torch.autograd.grad(eager(wide), wide, create_graph=True)
    along = gradient * wide.detach()
    if derivative in (FORWARD["hessian"], jvp_of_gradient):
        expected = torch.autograd.functional.hessian(eager, wide)
        expected = expected if derivative is not jvp_of_gradient else (expected * wide.detach()).sum((2, 3))
    else:
        expected = gradient if derivative is FORWARD["jacfwd"] else along.sum()
    torch.testing.assert_close(found.double(), expected.detach(), **CLOSE)


@pytest.mark.parametrize("recompute", [False, True])
def test_what_is_constant_in_forward_mode_is_computed(recompute, uncompiled):
    logits, y, _ = problem(N, K, {})
    with torch.autograd.forward_ad.dual_level():
        loss = self_regularized_entropy(logits.requires_grad_(), y, recompute=recompute)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0].double(), truth(logits, y)[2], **CLOSE)
