"""What the tests share: logits, the loss with its gradient, and the truth."""

import mpmath
import torch

from sre_triton import reference, self_regularized_entropy
from sre_triton.primitives import RowOptions, as_tensors

# Every option, alone and together. "weight" and "target" are filled in by `problem`.
OPTIONS = {
    "default": {},
    "c": {"c": 1e-3},
    "reg_weight": {"reg_weight": -0.5},
    "class_mean": {"class_mean": True},
    "label_smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 0.01},
    "softcap": {"softcap": 2.0},
    "weight": {"weight": True},
    "weight+smoothing": {"weight": True, "label_smoothing": 0.3},
    "all": {
        "weight": True,
        "c": 1e-5,
        "reg_weight": 0.7,
        "class_mean": True,
        "label_smoothing": 0.2,
        "z_loss": 0.1,
        "softcap": 4.0,
    },
}

# Of a number in each dtype: half a unit in its last place. The interpreter does not round to bfloat16 but cuts off.
ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-7, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def problem(N, K, options, *, probabilities=False, spread=3.0, seed=0, dtype=torch.float32):
    """Logits, target and the options with their class weights."""
    device = torch.get_default_device()
    with torch.device("cpu"):  # where the random numbers are the same on every machine
        generator = torch.Generator().manual_seed(seed)
        logits = (torch.randn(N, K, generator=generator) * spread).to(dtype)
        target = torch.randint(K, (N,), generator=generator)
        weight = torch.rand(K, generator=generator) + 0.1
        if probabilities:
            target = torch.rand(N, K, generator=generator)
            target = target / target.sum(1, keepdim=True) * torch.linspace(0.5, 1.5, N)[:, None]
    options = dict(options)
    if options.get("weight"):
        options["weight"] = weight.to(device, dtype)
    return logits.to(device), target.to(device), options


def options_of(**options):
    """The last argument of the primitives."""
    values = {"c": 1e-7, "reg_weight": 1.0, "ignore_index": -100}
    values |= {name: value for name, value in options.items() if name in RowOptions._fields}
    return RowOptions(*as_tensors(RowOptions(**values)))


def loss_and_gradient(logits, target, *, upstream=None, loss=self_regularized_entropy, **options):
    """The loss, its parts and the gradient of the loss with respect to the logits."""
    leaf = logits.detach().clone().requires_grad_()
    value, parts = loss(leaf, target, return_parts=True, **options)
    value.backward(torch.ones_like(value) if upstream is None else upstream)
    return value.detach(), parts, leaf.grad


def truth(logits, target, *, upstream=None, **options):
    """The same in float64, by the definition."""
    wide = {name: value.double() if name == "weight" else value for name, value in options.items()}
    target = target.double() if target.is_floating_point() else target

    def loss(leaf, target, return_parts, **keywords):
        return reference.self_regularized_entropy(leaf, target, **keywords)

    return loss_and_gradient(logits.double(), target, upstream=upstream, loss=loss, **wide)


def assert_within_bounds(logits, target, backend, *, recompute=None, **options):
    """The bounds of float32 for each row and its gradient."""
    rows = {**options, "reduction": "none"}
    found = loss_and_gradient(logits, target, backend=backend, recompute=recompute, **rows)
    assert_found_within_bounds(found, logits, target, **rows)


def assert_found_within_bounds(found, logits, target, *, upstream=None, **options):
    """Of loss, parts and gradient: H and S to 2e-6 (H + S) + 3e-7 a row, its gradient to 5e-6 of its norm + 3e-7.

    Reduced, they are held to the sum over the rows; half precision gradients to a rounding more.
    """
    loss, parts, gradient = found
    true_loss, true_parts, true_gradient = truth(logits, target, upstream=upstream, **options)
    size, z_loss, rows = true_parts.cross_entropy.abs() + true_parts.regularizer.abs(), true_parts.z_loss, 1
    scale = 1.0 if upstream is None else upstream.abs()
    reduction = options.get("reduction", "mean")
    if reduction != "none":
        _, each, _ = truth(logits, target, **options | {"reduction": "none"})
        size, rows = (each.cross_entropy.abs() + each.regularizer.abs()).sum(), len(logits)
    if reduction == "mean":
        counted = torch.ones(rows)
        if not target.is_floating_point():
            counted = reference.sample_weights(target, options.get("weight"), options.get("ignore_index", -100))
        factor = 1 / counted.double().sum()
        size, rows, scale = size * factor, rows * factor, scale * factor
    for part, true_part in zip(parts[:2], true_parts[:2], strict=True):
        assert ((part.double() - true_part).abs() <= 2e-6 * size + 3e-7 * rows).all(), (part - true_part).abs().max()
    assert ((loss.double() - true_loss).abs() <= 5e-6 * (size + z_loss) + 1e-6 * rows).all()
    error, norm = (gradient.double() - true_gradient).norm(dim=1), true_gradient.norm(dim=1)
    rounding = 0 if logits.dtype in (torch.float32, torch.float64) else 2 * ROUNDING[logits.dtype]  # or a cutting off
    bound = (5e-6 + rounding) * norm + 3e-7 * scale
    assert (error <= bound).all(), (error / bound).max()


def mp_row(z, y, weight, omega, *, c, reg_weight, class_mean, label_smoothing, z_loss, softcap):
    """(loss, H, S, α lse²) of one row in mpmath, straight from the formulas in probabilities."""
    K = len(z)
    z = [softcap * mpmath.tanh(z_j / softcap) if softcap else z_j for z_j in z]
    total = mpmath.fsum(mpmath.exp(z_j) for z_j in z)
    p = [mpmath.exp(z_j) / total for z_j in z]
    y = [(1 - label_smoothing) * y_j + label_smoothing / K for y_j in y]

    def R(p_j):
        a, b = c / (c + p_j), p_j / (c + p_j)
        return a * mpmath.log(a) + b * mpmath.log(b)

    H = -mpmath.fsum(y_j * w_j * mpmath.log(p_j) for y_j, w_j, p_j in zip(y, weight, p, strict=True))
    S = -omega * mpmath.fsum((1 - y_j) * R(p_j) for y_j, p_j in zip(y, p, strict=True))
    if class_mean:
        S = S / (K - 1) if K > 1 else mpmath.mpf(0)
    Z = z_loss * omega * mpmath.log(total) ** 2
    return H - reg_weight * S + Z, H, S, Z


def mp_truth(logits, target, options):
    """Rows of (loss, H, S, α lse²) and of gradients, with 50 digits, the gradients by differences."""
    number = mpmath.mpf
    K = logits.shape[1]
    settings = {"c": 1e-7, "reg_weight": 1.0, "class_mean": False, "label_smoothing": 0.0, "z_loss": 0.0}
    settings |= {name: value for name, value in options.items() if name in settings}
    settings = {name: value if isinstance(value, bool) else number(value) for name, value in settings.items()}
    settings["softcap"] = number(options["softcap"]) if "softcap" in options else None
    weight = [number(w) for w in options["weight"].tolist()] if "weight" in options else [number(1)] * K
    rows, gradients = [], []
    with mpmath.workdps(50):
        step = number(10) ** -18
        for z, g in zip(logits.double().tolist(), target.tolist(), strict=True):
            z = [number(z_j) for z_j in z]
            y = [number(y_j) for y_j in g] if isinstance(g, list) else [number(j == g) for j in range(K)]
            omega = mpmath.fsum(y_j * w_j for y_j, w_j in zip(y, weight, strict=True)) if "weight" in options else 1

            def loss(z, y=y, omega=omega):
                return mp_row(z, y, weight, omega, **settings)

            def moved(k, by, z=z):
                return loss([z_j + (by if j == k else 0) for j, z_j in enumerate(z)])[0]

            rows.append([float(value) for value in loss(z)])
            gradients.append([float((moved(k, step) - moved(k, -step)) / (2 * step)) for k in range(K)])
    return torch.tensor(rows, dtype=torch.float64), torch.tensor(gradients, dtype=torch.float64)


def linear_problem(shape, D, K, options, *, probabilities=False, dtype=torch.float32):
    """Features (*shape, D), W, b, target and options, with logits that are exact in every dtype: quarters below 32."""
    device = torch.get_default_device()
    N = torch.Size(shape).numel()
    _, target, options = problem(N, K, options, probabilities=probabilities, dtype=dtype)
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(1)
        input = torch.randint(-1, 2, (*shape, D), generator=generator)
        linear_weight = torch.randint(-4, 5, (K, D), generator=generator) / 4
        linear_bias = torch.randint(-8, 9, (K,), generator=generator) / 4
    target = target.reshape(*shape, K) if probabilities else target.reshape(shape)
    tensors = (tensor.to(device, dtype).requires_grad_() for tensor in (input, linear_weight, linear_bias))
    return *tensors, target, options


def linear_truth(input, linear_weight, linear_bias, target, *, upstream=None, **options):
    """In float64: the loss, its parts, the gradients of input, W and b, and the gradient of the logits (N, K)."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in (input, linear_weight, linear_bias)]
    rows = leaves[0].reshape(-1, input.shape[-1])
    logits = torch.nn.functional.linear(rows, *leaves[1:])
    target = target.reshape(-1, logits.shape[1]).double() if target.is_floating_point() else target.reshape(-1)
    wide = {name: value.double() if name == "weight" else value for name, value in options.items()}
    loss, parts = reference.self_regularized_entropy(logits, target, **wide)
    logits.retain_grad()
    loss.backward(torch.ones_like(loss) if upstream is None else upstream.reshape(loss.shape).double())
    return loss.detach(), parts, [leaf.grad for leaf in leaves], logits.grad


def assert_linear_within_bounds(found, tensors, target, *, upstream=None, **options):
    """The bounds of float32 for rows of logits and their gradients, carried through the products; then one rounding.

    ``found`` are the loss, its parts, and the gradients of ``tensors``: input, W and b.
    """
    loss, parts, gradients = found
    true_loss, true_parts, true_gradients, of_logits = linear_truth(*tensors, target, upstream=upstream, **options)
    dtype = tensors[0].dtype
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    size = true_parts.cross_entropy.abs() + true_parts.regularizer.abs()
    rows = len(of_logits) if options.get("reduction") == "sum" else 1
    for ours, true in zip(parts[:2], true_parts[:2], strict=True):
        assert ours.dtype == exact
        assert ((ours.flatten() - true).abs() <= 2e-6 * size + 3e-7 * rows).all()
    assert loss.dtype == exact
    assert ((loss.flatten() - true_loss).abs() <= 5e-6 * (size + true_parts.z_loss) + 1e-6 * rows).all()
    input, W, _ = (tensor.detach().double() for tensor in tensors)
    x = input.reshape(-1, input.shape[-1])
    row_error = 5e-6 * of_logits.norm(dim=1) + 3e-7 * of_logits.abs().max()
    # The gradient of the logits is rounded, then that of the tensor; products in between sum in float32.
    row_error = row_error + (ROUNDING[dtype] + 1e-6) * of_logits.norm(dim=1)
    bounds = row_error.norm() * W.norm(2), row_error.norm() * x.norm(2), row_error.norm() * len(x) ** 0.5
    for ours, true, bound in zip(gradients, true_gradients, bounds, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - true).norm() <= bound + (ROUNDING[dtype] + 1e-6) * true.norm()
