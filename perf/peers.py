"""Other implementations of cross entropy, one adapter each: what they are called, and how much memory they move.

PEERS take logits and a target, LINEAR_PEERS features, a classifier's weight and a target.

``moves`` counts how often a step, forward + backward, reads or writes a matrix as large as the logits; a copy does it
twice. Kernels that write the gradient into the logits get a matrix of their own for it.
"""

import functools
import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sre_triton.chunks import rows_of_chunk


class Peer(NamedTuple):
    """How to make the loss, a function of logits and target, and what it costs."""

    make: Callable[[], Callable[[Tensor, Tensor], Tensor]]
    moves: float
    inplace: bool = False


def _liger() -> Callable[[Tensor, Tensor], Tensor]:
    return importlib.import_module("liger_kernel.transformers.functional").liger_cross_entropy


def _quack() -> Callable[[Tensor, Tensor], Tensor]:
    return importlib.import_module("quack.cross_entropy").cross_entropy


def _plain_linear(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), target)


def _chunked() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda x, weight, target: F.linear_cross_entropy(x, weight, target, options=options)


def _our_chunks() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    options = functools.partial(torch.nn.LinearCrossEntropyOptions, chunking_method=None, acc_policy="accurate")

    def loss(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        rows = rows_of_chunk(x.shape[0], weight.shape[0], x.device)
        return F.linear_cross_entropy(x, weight, target, options=options(batch_chunk_size=rows))

    return loss


def _liger_linear() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    _needs_gpu()
    return importlib.import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy


def _cce() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    _needs_gpu()
    return importlib.import_module("cut_cross_entropy").linear_cross_entropy


def _needs_gpu() -> None:
    if not torch.cuda.is_available():
        raise ImportError("its kernels need a GPU")


PEERS = {
    # Reads and writes of log_softmax, the gradient of nll_loss filled with 0, read together with log_softmax's output.
    "F.cross_entropy": Peer(lambda: F.cross_entropy, 6),
    # One read for the sum of exponentials (two where it does not find the online softmax), one more and the gradient.
    "F.cross_entropy, compiled": Peer(lambda: torch.compile(F.cross_entropy, dynamic=True), 3),
    "Liger": Peer(_liger, 3, inplace=True),
    "Quack": Peer(_quack, 3),
}

# How to make each: a function of features (N, D), weight (K, D) and target (N,).
LINEAR_PEERS = {
    "F.linear, F.cross_entropy": lambda: _plain_linear,
    "F.linear, F.cross_entropy, compiled": lambda: torch.compile(_plain_linear, dynamic=True),
    "F.linear_cross_entropy": _chunked,
    "F.linear_cross_entropy, our chunks": _our_chunks,
    "Liger": _liger_linear,
    "ml-cross-entropy": _cce,
}


@functools.cache
def available() -> tuple[dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Peer]], dict[str, str]]:
    """The losses that import, and why the others do not."""
    losses, missing = {}, {}
    for name, peer in PEERS.items():
        try:
            losses[name] = peer.make(), peer
        except Exception as error:  # what a foreign package raises on import is its own affair
            missing[name] = f"{type(error).__name__}: {error}"
    return losses, missing
