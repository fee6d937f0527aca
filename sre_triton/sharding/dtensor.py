"""DTensors: what of them is on this rank, which shard of the classes that is, and what becomes of the loss.

One dimension of a mesh at most shards the classes: it is the group of a :class:`VocabShard`. The others shard rows, or
replicate. Ranks that have other rows know nothing of each other, as in data parallel training: each adds to the loss
its own mean times its share of the rows, and a sum over ranks that is still to come is what a DTensor calls partial.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from ..checks import check_indices
from ..messages import short, wrong
from .shard import VocabShard, sharded_dims, wrong_placements

Dims = list[int | None]  # for each dimension of a mesh, the dimension of a tensor that it shards


def _local(argument: str, tensor: Tensor, mesh: DeviceMesh, wanted: list[Placement]) -> Tensor:
    """What of the tensor belongs to this rank. Plain tensors are the same on all ranks."""
    if not isinstance(tensor, DTensor):
        tensor = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    if tensor.device_mesh != mesh:
        expected = f"a DTensor on {short(mesh)}, as the logits"
        raise ValueError(f"{argument}: expected {expected}, got one on {short(tensor.device_mesh)}")
    if any(given not in (want, Replicate()) for given, want in zip(tensor.placements, wanted, strict=True)):
        raise wrong_placements(argument, tensor, f"with placements {short(tuple(wanted))} or replicated")
    return tensor.redistribute(placements=wanted).to_local()


class Layout(NamedTuple):
    """Where logits lie, and so where their loss does."""

    mesh: DeviceMesh
    dims: Dims
    class_dim: int
    shape: torch.Size
    share: float  # of all rows, those on this rank

    def _shards_rows(self, dim: int | None) -> bool:
        """Whether a dimension of the mesh that shards ``dim`` of the logits shards rows."""
        return dim not in (None, self.class_dim)

    def _placements(self, ndim: int) -> list[Placement]:
        """Of a tensor with the dimensions of the logits, or with all but the classes', which are replicated."""
        gone = self.class_dim if ndim < len(self.shape) else ndim
        return [Shard(dim - (dim > gone)) if self._shards_rows(dim) else Replicate() for dim in self.dims]

    def _local(self, argument: str, tensor: Tensor, class_dim: int, wanted: list[Placement]) -> Tensor:
        """Of all classes, or of this rank's if that is what a DTensor has."""
        if isinstance(tensor, DTensor):
            for i, (dim, given) in enumerate(zip(self.dims, tensor.placements, strict=True)):
                if dim == self.class_dim and given == Shard(class_dim):
                    wanted[i] = given
        return _local(argument, tensor, self.mesh, wanted)

    def of_target(self, target: Tensor) -> Tensor:
        """Class indices or probabilities of this rank's rows."""
        wanted = self._placements(target.dim())
        if target.dim() < len(self.shape):
            check_indices(target, self.shape, self.class_dim)
            return _local("target", target, self.mesh, wanted)
        return self._local("target", target, self.class_dim, wanted)

    def of_weight(self, weight: Tensor | None) -> Tensor | None:
        """Class weights."""
        if not isinstance(weight, DTensor):
            return weight
        return self._local("weight", weight, 0, [Replicate()] * self.mesh.ndim)

    def result(self, number: Tensor, reduction: str) -> DTensor:
        """The loss or a part of it."""
        if reduction == "none":
            placements = self._placements(len(self.shape) - 1)
            shape = self.shape[: self.class_dim] + self.shape[self.class_dim + 1 :]
        else:
            placements = [Partial() if self._shards_rows(dim) else Replicate() for dim in self.dims]
            shape = torch.Size()
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(number, self.mesh, placements, run_check=False, shape=shape, stride=stride)


def _layout(
    mesh: DeviceMesh, dims: Dims, class_dim: int, shape: tuple[int, ...], local_shape: tuple[int, ...]
) -> Layout:
    """The layout of logits, given their shape and that of this rank's part."""
    all_rows, rows = (torch.Size(size[:class_dim] + size[class_dim + 1 :]).numel() for size in (shape, local_shape))
    return Layout(mesh, dims, class_dim, torch.Size(shape), rows / all_rows if all_rows else 1.0)


def _check_shard(shard: VocabShard | None) -> None:
    """There is none: a DTensor says which classes it holds."""
    if shard is not None:
        raise wrong(ValueError, "shard", "None with a DTensor, whose placements say what it holds", shard)


def of_logits(
    input: DTensor, target: Tensor, weight: Tensor | None, shard: VocabShard | None
) -> tuple[Tensor, Tensor, Tensor | None, VocabShard | None, Layout]:
    """What of the arguments is on this rank, its shard, and where the loss lies."""
    _check_shard(shard)
    expected = "that is sharded on rows and, over one dimension of its mesh at most, on classes"
    class_dim = min(1, input.dim() - 1)
    dims = sharded_dims("input", input, expected)
    if dims.count(class_dim) > 1:
        raise wrong_placements("input", input, expected)
    if class_dim in dims:
        shard = VocabShard.over(input, class_dim, dims.index(class_dim))
    local = input.to_local()
    layout = _layout(input.device_mesh, dims, class_dim, tuple(input.shape), tuple(local.shape))
    return local, layout.of_target(target), layout.of_weight(weight), shard, layout


def of_linear(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    shard: VocabShard | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, VocabShard | None, Layout]:
    """The same of a linear layer and its loss."""
    _check_shard(shard)
    mesh = (linear_weight if isinstance(linear_weight, DTensor) else input).device_mesh
    replicated = [Replicate()] * mesh.ndim
    input, linear_weight, linear_bias = (
        tensor
        if isinstance(tensor, DTensor) or tensor is None
        else DTensor.from_local(tensor, mesh, replicated, run_check=False)
        for tensor in (input, linear_weight, linear_bias)
    )
    class_dim = input.dim() - 1
    of_classes = "that is sharded on classes, its dimension 0, over one dimension of its mesh at most"
    of_rows = "on the mesh of linear_weight, sharded on rows over other dimensions than those that shard classes"
    class_dims = sharded_dims("linear_weight", linear_weight, of_classes)
    if class_dims.count(0) > 1 or 1 in class_dims:
        raise wrong_placements("linear_weight", linear_weight, of_classes)
    row_dims = sharded_dims("input", input, of_rows)
    if input.device_mesh != mesh or class_dim in row_dims:
        raise wrong_placements("input", input, of_rows)
    dims = []
    for row_dim, of_class in zip(row_dims, class_dims, strict=True):
        if row_dim is not None and of_class is not None:
            raise wrong_placements("input", input, of_rows)
        dims.append(class_dim if of_class == 0 else row_dim)
    if 0 in class_dims:
        shard = VocabShard.over(linear_weight, 0, class_dims.index(0))
    placements = linear_weight.placements
    if linear_bias is not None and (linear_bias.device_mesh, linear_bias.placements) != (mesh, placements):
        raise wrong_placements("linear_bias", linear_bias, f"with linear_weight's placements, {short(placements)}")

    # Each rank's gradient of a parameter is of its own rows. All that redistribute does is to sum them, in backward.
    gradients = [
        Partial() if row_dim is not None else placement for row_dim, placement in zip(row_dims, placements, strict=True)
    ]
    parameters = (
        None if tensor is None else tensor.redistribute(placements=placements).to_local(grad_placements=gradients)
        for tensor in (linear_weight, linear_bias)
    )
    local = input.to_local()
    shape, num_here = (*input.shape[:-1], linear_weight.shape[0]), linear_weight.to_local().shape[0]
    layout = _layout(mesh, dims, class_dim, shape, (*local.shape[:-1], num_here))
    return (
        local,
        *parameters,
        layout.of_target(target),
        layout.of_weight(weight),
        shard,
        layout,
    )
