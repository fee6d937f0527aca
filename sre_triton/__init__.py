"""Self-regularized entropy: a loss for classification over very many classes, as fast as cross entropy.

For one row of logits z with target class g, p = softmax(z) and c = 1e-7:

    H = -log p_g                                        cross entropy
    R(p) = a log a + b log b,  a = c/(c+p),  b = p/(c+p)
    S = -sum_{j != g} R(p_j)                            self-regularized entropy
    loss = mean over rows of (H - λ S)                  minimised

The letters, everywhere in the code: N rows, K classes, D features of a linear layer, c the suppression level,
lse = logsumexp(z), t = log(p / c), h = -R(p), u = -dh/dt, U = sum u, λ the weight of S, ε label smoothing, α z-loss.

    what people call    functional.py: the two functions;  modules.py, schedule.py
    a call              options.py: every keyword;  checks.py, arguments.py: tensors in;  results.py: results out
                        messages.py: how errors are worded, and the warnings;  layer.py: a layer, or more
    the definition      reference.py;  eager.py: the same in few operations, for plain autograd
    gradients           autograd.py: of logits;  linear.py, chunks.py, flops.py: of a linear layer, a chunk at a time
    the seam            primitives.py: five signatures, registered with PyTorch;  backend.py: who computes them
    PyTorch             internals.py: its private names, each with a way to do without
    kernels/        Triton, for GPUs
        groups.py, formulas.py      the mathematics of a tile of classes
        rows.py, memory.py          the statistics of a row; where its classes lie in memory
        walks.py, kernels.py        sums over a row's tiles, and their gradient; the kernels
        small.py                    the small kernels of a step: the mean, the upstream gradient
        plan.py, launch.py          which way a kernel takes: the table; its launch
        primitives.py               the five, as launches
    compiled/       torch.compile, for machines without Triton and for float64
        formulas.py, passes.py      the mathematics of a class; that of rows, written to become one loop
        inductor.py                 the compiler, asked once for every set of options
        primitives.py               the five, as passes
    sharding/       shard.py: the classes of a rank;  collectives.py: what ranks tell each other;  dtensor.py

Where a formula stands, three times (reference alone: in its one function, self_regularized_entropy):

    formula                     reference               kernels/                      compiled/
    log sum exp z               reference               walks.lse_of_tiles            passes.lse_pass
    t and the coin's odds       reference               formulas.coin                 formulas.coin
    h, the coin's entropy       reference.coin_entropy  formulas.coin_h_and_u         formulas.h_of
    u = -dh/dt                  -                       formulas.coin_h_and_u         formulas.u_of
    sums of h and u             reference               rows.sums_with_targets        passes.sums_pass
    H, S and the loss of a row  reference               rows.losses_of                passes.losses_of
    coefficients of p, u, 1     -                       rows.coefficients_of          passes.coefficients_of
    the gradient of a class     -                       formulas.gradient_of          passes.gradient_of
    that at the target          -                       walks.store_gradient_of_rest  passes.coefficients_of
    ε / K and 1 - ε             reference               rows.shares                   passes.shares
"""

from .functional import linear_self_regularized_entropy, self_regularized_entropy
from .modules import LinearSelfRegularizedEntropyLoss, SelfRegularizedEntropyLoss
from .reference import Parts
from .schedule import ramp
from .sharding.shard import VocabShard

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
