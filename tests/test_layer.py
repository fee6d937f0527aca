"""The head's layer, whatever became of it: the loss and gradients of the plain pair, layer and loss."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from sre_triton import LinearSelfRegularizedEntropyLoss, messages, self_regularized_entropy

N, D, K = 6, 8, 20
exact = {"rtol": 1e-11, "atol": 1e-12}


def head_of(change=lambda linear: None, **options):
    """The same at each call."""
    torch.manual_seed(0)
    head = LinearSelfRegularizedEntropyLoss(D, K, bias=True, dtype=torch.float64, return_parts=True, **options)
    change(head.linear)
    return head


def features(*shape):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*(shape or (N,)), D, generator=generator, dtype=torch.float64)


def pair(head, x, target):
    """What ``head(x, target)`` is to be: its layer is called, and plain autograd does the rest."""
    logits = head.linear(x)
    options = {name: value for name, value in head._options().items() if name not in ("chunk_rows", "backend")}
    rows = logits.shape[:-1]
    target = target.reshape(-1, K) if target.dim() == logits.dim() else target.flatten()
    found = self_regularized_entropy(logits.reshape(-1, K), target, head.weight, backend="eager", **options)
    if head.reduction == "none":
        return found[0].reshape(rows), tuple(part.reshape(rows) for part in found[1])
    return found


def step(head, x, target, function=None):
    """Loss, parts, and the gradients of features and parameters."""
    torch.manual_seed(2)
    x = x.clone().requires_grad_()
    loss, parts = head(x, target) if function is None else function(head, x, target)
    head.zero_grad()
    loss.sum().backward()
    return loss.detach(), tuple(parts), x.grad, [p.grad for p in head.parameters() if p.requires_grad]


def assert_is_the_pair(make, x, target):
    """The same numbers, gradients and state after a step."""
    head, plain = make(), make()
    expected = step(plain, x, target, pair)
    found = step(head, x, target)
    torch.testing.assert_close(found, expected, **exact)
    assert all(gradient is not None for gradient in found[-1])
    torch.testing.assert_close(head.state_dict(), plain.state_dict(), **exact)


@pytest.fixture
def with_logits(monkeypatch):
    """How many logits the head made, each time that it called its layer."""
    found, of_logits = [], LinearSelfRegularizedEntropyLoss._of_logits

    def spy(self, logits, target):
        found.append(logits.numel())
        return of_logits(self, logits, target)

    monkeypatch.setattr(LinearSelfRegularizedEntropyLoss, "_of_logits", spy)
    return found


# -- layers that are to be called -------------------------------------------------------------------------------------


class Cosine(torch.nn.Linear):
    def forward(self, x):
        return F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1), self.bias)


class Adapter(torch.nn.Module):
    """As LoRA: the layer goes on beside two that are trained, with dropout."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = torch.nn.Linear(D, 2, dtype=torch.float64), torch.nn.Linear(2, K, dtype=torch.float64)
        self.dropout = torch.nn.Dropout(0.5)

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        return self.base(x) + self.up(self.down(self.dropout(x)))


class Quantized(torch.nn.Module):
    def __init__(self, base):
        super().__init__()
        self.scale = torch.nn.Parameter(base.weight.detach().abs().amax(1) / 127)
        self.register_buffer("weight", (base.weight.detach() / self.scale.detach()[:, None]).round().to(torch.int8))
        self.bias = None

    def forward(self, x):
        return x @ (self.weight * self.scale[:, None]).t()


class Doubled(torch.Tensor):
    """A weight whose product is another one."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        found = super().__torch_function__(function, types, args, kwargs or {})
        return 2 * found.as_subclass(torch.Tensor) if function is F.linear else found


class Calls(torch.nn.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


def with_forward_of_its_own(linear):
    old = linear.forward
    linear.forward = lambda x: 2 * old(x)


def with_a_weight_of_another_kind(linear):
    linear.weight = torch.nn.Parameter(linear.weight.detach().as_subclass(Doubled))


def doubled(module, args, output):
    return 2 * output


CHANGES = {
    "subclass": lambda linear: setattr(linear, "__class__", Cosine),
    "call": lambda linear: setattr(linear, "__class__", Calls),
    "compiled call": lambda linear: linear.compile(backend="eager"),
    "forward": with_forward_of_its_own,
    "weight": with_a_weight_of_another_kind,
    "forward hook": lambda linear: linear.register_forward_hook(doubled),
    "forward hook, keywords": lambda linear: linear.register_forward_hook(
        lambda module, args, keywords, output: 2 * output, with_kwargs=True
    ),
    "pre-hook": lambda linear: linear.register_forward_pre_hook(lambda module, args: (args[0] / 2,)),
    "backward hook": lambda linear: linear.register_full_backward_hook(
        lambda module, grad_input, grad_output: (3 * grad_input[0],)
    ),
    "backward pre-hook": lambda linear: linear.register_full_backward_pre_hook(
        lambda module, grad_output: (3 * grad_output[0],)
    ),
}
LAYERS = {
    "adapter": Adapter,
    "quantized": Quantized,
    "layers": lambda linear: torch.nn.Sequential(torch.nn.Dropout(0.5), linear, torch.nn.Tanh()),
    "compiled": lambda linear: torch.compile(linear, backend="eager"),
}


def changed(name, **options):
    """A head whose layer is not plain."""
    head = head_of(CHANGES.get(name, lambda linear: None), **options)
    if name in LAYERS:
        head.linear = LAYERS[name](head.linear)
    return head


def first(shape, *, probabilities=False):
    generator = torch.Generator().manual_seed(3)
    if probabilities:
        return torch.rand(*shape, K, generator=generator, dtype=torch.float64)
    return torch.randint(K, shape, generator=generator)


@pytest.mark.parametrize("name", [*CHANGES, *LAYERS])
def test_a_layer_that_is_not_plain_is_called(name, with_logits, uncompiled):
    assert_is_the_pair(lambda: changed(name), features(), first((N,)))
    assert with_logits == [N * K]  # once


HOOKS = {
    "forward": (torch.nn.modules.module.register_module_forward_hook, doubled),
    "pre": (torch.nn.modules.module.register_module_forward_pre_hook, lambda module, args: (args[0] / 2, *args[1:])),
    "backward": (torch.nn.modules.module.register_module_full_backward_hook, lambda module, given, _: (3 * given[0],)),
}


@pytest.mark.parametrize(("register", "hook"), HOOKS.values(), ids=HOOKS)
def test_hooks_of_all_modules(register, hook, uncompiled):
    seen, results = [], []

    def on_layer(module, *args):
        if type(module) is torch.nn.Linear:
            seen.append(module)
            return hook(module, *args)
        return None

    for function in (None, pair):
        handle = register(on_layer)
        try:
            results.append(step(head_of(), features(), first((N,)), function))
        finally:
            handle.remove()
        assert len(seen) == len(results)
    torch.testing.assert_close(*results, **exact)


@pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("shape", [(), (N,), (2, 3), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_shapes_and_options(reduction, shape, probabilities, uncompiled):
    options = {
        "weight": torch.rand(K, dtype=torch.float64), "reduction": reduction, "label_smoothing": 0.1, "z_loss": 0.01,
        "softcap": 7.0, "class_mean": True, "reg_weight": 0.5, "chunk_rows": 2,
    }  # fmt: skip
    target = first(shape, probabilities=probabilities)
    if shape == (2, 3) and not probabilities:
        target[1, 1] = -100
    x = features(*shape) if shape else features(1)[0]
    assert_is_the_pair(lambda: changed("forward hook", **options), x, target)


def test_half_precision_and_autocast(uncompiled):
    head = LinearSelfRegularizedEntropyLoss(D, K)
    CHANGES["forward hook"](head.linear)
    x, target = features().float(), first((N,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = head(x, target)
        expected = self_regularized_entropy(2 * F.linear(x, head.linear.weight), target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("name", ["forward hook", "adapter"])
def test_under_the_users_compile(name, with_logits, uncompiled):
    torch.compiler.reset()
    head, plain = changed(name).eval(), changed(name).eval()  # without dropout, which a graph draws anew
    x, target = features(2, 3), first((2, 3))
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    found = step(head, x, target, lambda _, *args: compiled(*args))
    torch.testing.assert_close(found, step(plain, x, target, pair), **exact)
    assert with_logits


def test_says_once_what_it_costs(monkeypatch, uncompiled):
    monkeypatch.setattr(messages, "_warned", set())
    x, target = features(), first((N,))
    head_of()(x, target)  # in silence, as are all others
    head = changed("adapter")
    with pytest.warns(UserWarning, match="linear: expected a plain nn.Linear .* all logits") as caught:
        head(x, target)
    assert caught[0].filename == __file__
    head(x, target)


def test_a_forward_that_others_put_into_the_class_is_called(monkeypatch, uncompiled):
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: 2 * F.linear(x, self.weight, self.bias))
    head, x, target = head_of(), features(), first((N,))
    torch.testing.assert_close(step(head, x, target), step(head, x, target, pair), **exact)


def test_a_target_that_is_no_tensor(uncompiled):
    with pytest.raises(TypeError, match="^target: expected a tensor, got "):
        changed("adapter")(features(2, 3), [1, 2])


def test_says_it_while_compiling(monkeypatch, uncompiled):
    torch.compiler.reset()
    monkeypatch.setattr(messages, "_warned", set())
    compiled = torch.compile(changed("adapter"), fullgraph=True, backend="aot_eager")
    with pytest.warns(UserWarning, match="all logits"):
        compiled(features(), first((N,)))
    compiled(features(), first((N,)))


# -- layers that are a product with their weight ----------------------------------------------------------------------


class Shared(torch.nn.Module):
    """Counts how often it is computed."""

    calls = 0

    def forward(self, weight):
        Shared.calls += 1
        return weight - weight.mean(0)


class Named(torch.nn.Linear):
    """A name, and no forward."""


PLAIN = {
    "plain": lambda linear: linear,
    "subclass": lambda linear: setattr(linear, "__class__", Named),
    "a parameter of another kind": lambda linear: setattr(
        linear, "weight", type("Tagged", (torch.nn.Parameter,), {})(linear.weight.detach())
    ),
    "spectral_norm": parametrizations.spectral_norm,
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "parametrized": lambda linear: parametrize.register_parametrization(linear, "weight", Shared()),
    "parametrized bias": lambda linear: parametrize.register_parametrization(linear, "bias", Shared()),
    "two": lambda linear: parametrizations.spectral_norm(parametrizations.weight_norm(linear)),
}
HOOKED = {
    "old spectral_norm": torch.nn.utils.spectral_norm,
    "old weight_norm": pytest.param(
        torch.nn.utils.weight_norm,
        marks=pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning"),
    ),
    "prune": lambda linear: prune.custom_from_mask(linear, "weight", torch.eye(K, D) == 0),
    "prune, by size": lambda linear: prune.l1_unstructured(linear, "bias", 5),
    "prune, twice": lambda linear: [prune.ln_structured(linear, "weight", 2, n=2, dim=i) for i in (0, 1)],
    "prune, of a parametrized": lambda linear: prune.l1_unstructured(parametrizations.orthogonal(linear), "bias", 5),
}


@pytest.mark.parametrize("change", [*PLAIN.values(), *HOOKED.values()], ids=[*PLAIN, *HOOKED])
def test_training_is_that_of_the_pair(change, with_logits, uncompiled):
    heads, functions = [head_of(change) for _ in range(2)], (None, pair)
    optimizers = [torch.optim.SGD(head.parameters(), lr=0.5) for head in heads]
    losses = []
    for _ in range(4):
        results, counts = [], []
        for head, function, optimizer in zip(heads, functions, optimizers, strict=True):
            Shared.calls = 0
            results.append(step(head, features(), first((N,)), function))
            counts.append(Shared.calls)
            optimizer.step()
        torch.testing.assert_close(*results, **exact)
        torch.testing.assert_close(*(head.state_dict() for head in heads), **exact)
        assert counts[0] == counts[1]
        losses.append(results[0][0])
    assert losses[-1] < losses[0]
    assert bool(with_logits) == (change not in PLAIN.values())


def test_cached_parametrizations(uncompiled):
    head = head_of(PLAIN["parametrized"])
    Shared.calls = 0
    with parametrize.cached():
        head(features(), first((N,)))
        head(features(), first((N,)))
    assert Shared.calls == 1


def test_other_ways_to_a_weight(with_logits, uncompiled):
    def uninitialized():
        head = head_of()
        head.linear = torch.nn.utils.skip_init(torch.nn.Linear, D, K, dtype=torch.float64)
        torch.nn.init.normal_(head.linear.weight)
        torch.nn.init.zeros_(head.linear.bias)
        return head

    def tied():
        head = head_of()
        head.linear.weight = torch.nn.Embedding(K, D, dtype=torch.float64).weight
        return head

    x, target = features(), first((N,))
    for make in (uninitialized, tied):
        assert_is_the_pair(make, x, target)
    head = head_of()
    others = {name: torch.randn_like(value).requires_grad_() for name, value in head.named_parameters()}
    loss, _ = torch.func.functional_call(head, others, (x, target))
    expected = self_regularized_entropy(F.linear(x, others["linear.weight"], others["linear.bias"]), target)
    torch.testing.assert_close(loss, expected, **exact)
    gradients = torch.autograd.grad(loss, list(others.values()))
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, list(others.values())), **exact)
    assert not with_logits


def test_a_lazy_layer_is_called_until_it_is_one(with_logits, uncompiled):
    head = head_of()
    head.linear = torch.nn.LazyLinear(K, dtype=torch.float64)
    for _ in range(2):
        head(features(), first((N,)))
    assert with_logits == [N * K]


def test_parametrized_under_the_users_compile(with_logits, uncompiled):
    torch.compiler.reset()
    head, plain = (head_of(PLAIN["weight_norm"]) for _ in range(2))
    x, target = features(), first((N,))
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    found = step(head, x, target, lambda _, *args: compiled(*args))
    torch.testing.assert_close(found, step(plain, x, target, pair), **exact)
    assert not with_logits
