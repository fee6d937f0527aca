"""Two networks for images of 28 x 28 pixels, both small enough to be trained a thousand times on a CPU."""

import torch
import torch.nn.functional as F
from data import NUM_CLASSES
from torch import Tensor, nn


def small() -> nn.Sequential:
    """The network of 166 thousand parameters of "Provable Defenses via the Convex Outer Polytope", arXiv:1711.00851."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 100),
        nn.ReLU(),
        nn.Linear(100, NUM_CLASSES),
    )


class Block(nn.Module):
    """Two convolutions with batch normalization, and a way around both. "Deep Residual Learning", arXiv:1512.03385."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.around = nn.Identity()
        if inputs != outputs:
            self.around = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""
        return F.relu(self.around(x) + self.convolutions(x))


def residual() -> nn.Sequential:
    """A residual network of 8 layers and 78 thousand parameters, which begins at 14 x 14 pixels."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        Block(16, 16, 1),
        Block(16, 32, 2),
        Block(32, 64, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, NUM_CLASSES),
    )


MODELS = {"small": small, "residual": residual}


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """(N, 1, 28, 28) -> (N, K), a thousand images at a time."""
    return torch.cat([model(part) for part in images.split(1000)])
