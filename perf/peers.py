"""Other implementations of cross entropy, one adapter each: what they are called, and how much memory they move.

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


class Peer(NamedTuple):
    """How to make the loss, a function of logits and target, and what it costs."""

    make: Callable[[], Callable[[Tensor, Tensor], Tensor]]
    moves: float
    inplace: bool = False


def _liger() -> Callable[[Tensor, Tensor], Tensor]:
    return importlib.import_module("liger_kernel.transformers.functional").liger_cross_entropy


def _quack() -> Callable[[Tensor, Tensor], Tensor]:
    return importlib.import_module("quack.cross_entropy").cross_entropy


def _cce() -> Callable[[Tensor, Tensor], Tensor]:
    importlib.import_module("cut_cross_entropy")
    raise ImportError("it takes features and a classifier, never logits: see the sweep of the linear layer")


PEERS = {
    # Reads and writes of log_softmax, the gradient of nll_loss filled with 0, read together with log_softmax's output.
    "F.cross_entropy": Peer(lambda: F.cross_entropy, 6),
    # One read for the sum of exponentials (two where it does not find the online softmax), one more and the gradient.
    "F.cross_entropy, compiled": Peer(lambda: torch.compile(F.cross_entropy, dynamic=True), 3),
    "Liger": Peer(_liger, 3, inplace=True),
    "Quack": Peer(_quack, 3),
    "ml-cross-entropy": Peer(_cce, 0),
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
