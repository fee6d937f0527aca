"""Self-regularized entropy: a loss for classification over very many classes, as fast as cross entropy.

For one row of logits z with target class g, p = softmax(z) and c = 1e-7:

    H = -log p_g                                        cross entropy
    R(p) = a log a + b log b,  a = c/(c+p),  b = p/(c+p)
    S = -sum_{j != g} R(p_j)                            self-regularized entropy
    loss = mean over rows of (H - λ S)                  minimised

The letters, everywhere in the code: N rows, K classes, D features of a linear layer, c the suppression level,
lse = logsumexp(z), t = log(p / c), h = -R(p), u = -dh/dt, U = sum u, λ the weight of S, ε label smoothing, α z-loss.

    messages.py    what an error says, briefly whatever came, and where a warning is
    reference.py   the definition, in plain PyTorch
    eager.py       the same in few operations, for plain autograd
    ops.py         the primitives' signatures, registered with PyTorch
    tiles.py       Triton: the mathematics of a tile of classes
    rows.py        Triton: the numbers of a row
    loads.py       Triton: where a row's classes lie in memory
    kernels.py     Triton: the kernels
    scalars.py     Triton: the small kernels of a step, for the mean and the upstream gradient
    plan.py        which way a kernel takes: the table
    launch.py      the primitives, launched on a GPU
    coin.py        torch.compile: the mathematics of a class
    passes.py      torch.compile: that of a row, written to become one loop over the rows
    compiled.py    torch.compile: asked once for every set of options
    fallback.py    torch.compile: the primitives
    backend.py     chooses between them
    shard.py       which classes a rank has
    collectives.py what the ranks tell each other
    dtensor.py     DTensors: what of them is here
    checks.py      user input -> errors that say what was expected and what came
    layer.py       whether a layer is a product with its weight, and no more
    autograd.py    the two ways to the gradient
    loss.py        the public function
    flops.py       what FlopCounterMode counts
    chunks.py      a linear layer and its loss, a chunk of rows at a time
    linear.py      the public function for both together
    modules.py     the nn.Modules
    schedule.py    how λ grows during training
"""

from .linear import linear_self_regularized_entropy
from .loss import self_regularized_entropy
from .modules import LinearSelfRegularizedEntropyLoss, SelfRegularizedEntropyLoss
from .reference import Parts
from .schedule import ramp
from .shard import VocabShard

__version__ = "0.1.0"

__all__ = [
    "LinearSelfRegularizedEntropyLoss",
    "Parts",
    "SelfRegularizedEntropyLoss",
    "VocabShard",
    "linear_self_regularized_entropy",
    "ramp",
    "self_regularized_entropy",
]
