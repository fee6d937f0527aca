"""Which classes a rank has, where they are sharded over a process group or a DTensor."""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from ..internals import group_named, remember_group
from ..messages import check_int, short, wrong


def _chunk(num_classes: int, num_shards: int, index: int) -> tuple[int, int]:
    """Where the shard of that index begins and ends, by the rule of ``torch.chunk`` and DTensor."""
    size = -(-num_classes // num_shards)
    return min(size * index, num_classes), min(size * (index + 1), num_classes)


# What stands for the name of the default group, which another process may have under another name.
DEFAULT_GROUP = "default"


@dataclass(frozen=True, init=False)
class VocabShard:
    """The classes of this rank: from ``start`` on, before ``stop``, of ``num_classes`` that the group's ranks share.

    Every rank of the group calls the loss with its own logits and all targets, with the same options, and gets the
    loss of all classes and the gradient of its own logits. The shards may be of different sizes, or empty, and in any
    order; together they hold each class once.

    It knows the group by its name. So it can be copied and pickled, alone or in a module: a copy shares the group, and
    what another process loads means the default group there, or the one that ``new_group`` gave the same name, as it
    does where all processes make their groups in the same order. Loading needs no ``torch.distributed``; to call the
    loss without the group raises. (``torch.load`` with ``weights_only=True`` wants
    ``torch.serialization.add_safe_globals([VocabShard])``.)

    Args:
        start, stop: the first class of this rank, and the one after its last.
        num_classes: K, of all ranks together.
        group: a process group of ``torch.distributed``; None is the default group.

    Raises:
        TypeError, ValueError: unless 0 <= start <= stop <= num_classes.
        RuntimeError: ``torch.distributed`` is not initialized, or the group is gone.

    Example (on every rank)::

        shard = VocabShard.even(128256, group)
        head = torch.nn.Linear(4096, shard.stop - shard.start, bias=False)
        loss = self_regularized_entropy(head(features), labels, class_mean=True, shard=shard)
    """

    start: int
    stop: int
    num_classes: int
    name: str = field(repr=False)  # the group's

    def __init__(self, start: int, stop: int, num_classes: int, group: "dist.ProcessGroup | None" = None) -> None:
        """The arguments are the class's."""
        for argument, value in (("start", start), ("stop", stop), ("num_classes", num_classes)):
            check_int(argument, value)
            object.__setattr__(self, argument, int(value))
        if not 0 <= start <= stop <= num_classes or num_classes == 0:
            got = f"start={short(start)}, stop={short(stop)}, num_classes={short(num_classes)}"
            raise ValueError(f"shard: expected 0 <= start <= stop <= num_classes and a class at least, got {got}")
        group = _checked_group(group)
        object.__setattr__(self, "name", DEFAULT_GROUP if group is dist.group.WORLD else remember_group(group))

    @property
    def group(self) -> "dist.ProcessGroup":
        """The process group."""
        return group_of(self.name)

    @classmethod
    def even(cls, num_classes: int, group: "dist.ProcessGroup | None" = None) -> "VocabShard":
        """This rank's shard where all have the same size, but the last: as ``torch.chunk`` and DTensor shard.

        Args:
            num_classes: K.
            group: as above; the calling process is one of its ranks.
        """
        check_int("num_classes", num_classes)
        group = _checked_group(group)
        return cls(*_chunk(num_classes, dist.get_world_size(group), dist.get_rank(group)), num_classes, group)

    @classmethod
    def from_dtensor(cls, tensor: "torch.distributed.tensor.DTensor") -> "VocabShard":
        """The shard that a DTensor holds on this rank: of logits (N, K, ...), or of a linear layer's weight (K, D).

        The classes are the dimension that is sharded; where several are, dimension 1.

        Raises:
            ValueError: no dimension is sharded, the classes are so over several dimensions of the mesh, or there are
            placements other than ``Shard`` and ``Replicate``.
        """
        expected = "that is sharded on classes over one dimension of its mesh"
        if not hasattr(tensor, "placements"):
            raise wrong(TypeError, "tensor", f"a DTensor {expected}", tensor)
        dims = sharded_dims("tensor", tensor, expected)
        sharded = set(dims) - {None}
        dim = sharded.pop() if len(sharded) == 1 else 1
        if dims.count(dim) != 1:
            raise wrong_placements("tensor", tensor, expected)
        return cls.over(tensor, dim, dims.index(dim))

    @classmethod
    def over(cls, tensor: "torch.distributed.tensor.DTensor", dim: int, mesh_dim: int) -> "VocabShard":
        """The same, given the dimension of the tensor that is the classes, and that of the mesh that shards it."""
        mesh, num_classes = tensor.device_mesh, tensor.shape[dim]
        ends = _chunk(num_classes, mesh.size(mesh_dim), mesh.get_local_rank(mesh_dim))
        return cls(*ends, num_classes, mesh.get_group(mesh_dim))


def _checked_group(group: "dist.ProcessGroup | None") -> "dist.ProcessGroup":
    """The group; None is that of all processes."""
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise wrong(TypeError, "group", "a torch.distributed.ProcessGroup or None", group)
    if group is None and not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("group: expected torch.distributed to be initialized (init_process_group)")
    return group or dist.group.WORLD


def group_of(name: str) -> "dist.ProcessGroup":
    """The group of a shard. Ops take no process group, but its name."""
    if name == DEFAULT_GROUP:
        return _checked_group(None)
    try:
        return group_named(name)
    except RuntimeError:
        _checked_group(None)
        raise RuntimeError(
            f"group: expected the process group {short(name)}, for which the shard was made, to be there on this rank, "
            "got none of that name; make the same groups in the same order (new_group), or another VocabShard"
        ) from None


def wrong_placements(argument: str, tensor: "torch.distributed.tensor.DTensor", expected: str) -> ValueError:
    """What is wrong, and what to do."""
    return ValueError(
        f"{argument}: expected a DTensor {expected}, got placements {short(tensor.placements)}; "
        f"use {argument}.redistribute(placements=...)"
    )


def sharded_dims(argument: str, tensor: "torch.distributed.tensor.DTensor", expected: str) -> list[int | None]:
    """For each dimension of the mesh the dimension of the tensor that it shards, None where it replicates."""
    from torch.distributed.tensor import Replicate, Shard

    dims: list[int | None] = []
    for placement in tensor.placements:
        if type(placement) is not Shard and placement != Replicate():
            raise wrong_placements(argument, tensor, expected)
        dims.append(None if placement == Replicate() else placement.dim % tensor.dim())
    return dims
