"""Self-regularized entropy: a loss for classification over very many classes, in one fused pass over the logits.

For one row of logits z with target class g, p = softmax(z) and c = 1e-7:

    H = -log p_g                                        cross entropy
    R(p) = a log a + b log b,  a = c/(c+p),  b = p/(c+p)
    S = -sum_{j != g} R(p_j)                            self-regularized entropy
    loss = mean over rows of (H - λ S)                  minimised

The letters, everywhere in the code: N rows, K classes, D features of a linear layer, c the suppression level,
lse = logsumexp(z), t = log(p / c), h = -R(p), u = -dh/dt, U = sum u, λ the weight of S, ε label smoothing, α z-loss.

    functional.py       the two public functions: signatures and docstrings
    modules.py          the two loss modules;  schedule.py: ramp
    options.py          every keyword once: its check, and how it becomes a number for the rows
    checks.py           the checks of tensors;  messages.py: how errors are worded, all warnings, how they are raised
    arguments.py        tensors in: checked, as rows;  results.py: the factor of the mean, the reduction, the parts
    reference.py        the definition;  eager.py: the same in few operations, for plain autograd
    autograd.py         gradients of the loss of logits: computed in the forward, or in the backward
    linear.py           the same for a linear layer;  layer.py: whether nn.Linear is one, or has hooks and adapters
    chunks.py           linear layer and loss, a chunk of rows at a time;  linear_primitive.py: as a registered op
    flops.py            what FlopCounterMode counts for it
    backend.py          who computes: Triton, torch.compile or plain autograd
    primitives.py       the seam: the five functions of a backend, registered with PyTorch
    internals.py        PyTorch's private names, each with a way to do without
    __main__.py         ``python -m sre_triton``: what a report of a fault needs
    kernels/            Triton, for GPUs
        arithmetic.py   functions of one number: 2^x, log2, 1/x, tanh
        formulas.py     the mathematics of a tile of classes: exponentials, the coin, sums, the gradient of a class
        groups.py       how a tile lies in the threads, and reductions over it
        memory.py       where the classes of a row lie; which rows are ignored; loads, masks, the target's logit
        rows.py         the values of a row: losses, coefficients of the gradient, tuples
        walks.py        sums over the tiles of a row; the stores of the gradient, the target's last
        kernels.py      the kernels;  small.py: those for the mean and the upstream gradient
        plan.py         which way a row takes, by K: registers, a cluster, a loop;  launch.py: how it is launched
        primitives.py   the five, as launches
    compiled/           torch.compile, for machines without Triton and for float64
        formulas.py     the mathematics of a class
        passes.py       the mathematics of rows: losses, coefficients, the gradient, the target's
        columns.py      how passes are written, so that each becomes one loop
        waiting.py      when it pays to compile
        inductor.py     where torch.compile is asked, once for every set of options; Inductor itself through
                        `compile_and_catch` of internals.py
        uncompiled.py   the same in few operations, in place: for small problems, and where nothing can be compiled
        primitives.py   the five, as passes
    sharding/           classes over several ranks
        shard.py        which classes a rank has;  dtensor.py: the same, told by a DTensor
        collectives.py  what ranks send each other: the maximum, the sums; the losses of whole rows

tests/ has the same folders. tests/ptx/ runs the compiled kernels without a GPU, and notices a missing barrier.

A constant that was measured has the comment "Measured", with the machine; one that only a GPU can decide has "No GPU
has timed this".

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
    that at the target          -                       rows.gradient_at_targets      passes.coefficients_of
    ε / K and 1 - ε             reference               rows.shares                   passes.shares

and again, in PyTorch's operations, in uncompiled.py: `_Block`, whose methods are named by what they compute, for all
options, and `ordinary` for most calls.
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
