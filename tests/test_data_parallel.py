"""DDP and FSDP2: ranks that have other rows together compute the gradients of all."""

import pytest
import torch

from sre_triton import LinearSelfRegularizedEntropyLoss, SelfRegularizedEntropyLoss


class Plain(torch.nn.Module):
    """A linear layer, and the loss of its logits."""

    def __init__(self, in_features, num_classes, **options):
        super().__init__()
        self.linear = torch.nn.Linear(in_features, num_classes)
        self.criterion = SelfRegularizedEntropyLoss(**options)

    def forward(self, x, y):
        return self.criterion(self.linear(x), y)


def linear(in_features, num_classes, **options):
    return LinearSelfRegularizedEntropyLoss(in_features, num_classes, bias=True, chunk_rows=2, **options)


class Model(torch.nn.Module):
    def __init__(self, make, **options):
        super().__init__()
        self.body, self.head = torch.nn.Linear(8, 8), make(8, 21, **options)

    def forward(self, x, y):
        return self.head(self.body(x), y).mean()


def gradients_of(group, make, wrap, reduction):
    """Those of a model whose rows are shared by the ranks, and of the same model alone."""
    torch.manual_seed(0)
    model, alone = Model(make, reduction=reduction), Model(make)
    alone.load_state_dict(model.state_dict())
    x, y = torch.randn(6, 8), torch.randint(21, (6,))
    alone(x, y).backward()
    if wrap == "ddp":
        parallel = torch.nn.parallel.DistributedDataParallel(model, process_group=group)
    else:
        from torch.distributed.fsdp import fully_shard  # slow to import

        mesh = torch.distributed.device_mesh.DeviceMesh.from_group(group, x.device.type)
        fully_shard(model.head.linear if wrap == "fsdp2 of the layer" else model.head, mesh=mesh)
        parallel = fully_shard(model, mesh=mesh)
    mine = slice(3 * group.rank(), 3 * group.rank() + 3)
    parallel(x[mine], y[mine]).backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    gradients = gradients if wrap == "ddp" else [gradient.full_tensor() for gradient in gradients]
    return gradients, [parameter.grad for parameter in alone.parameters()]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("wrap", ["ddp", "fsdp2", "fsdp2 of the layer"])
@pytest.mark.parametrize("make", [Plain, linear])
def test_on_two_ranks(make, wrap, reduction, ranks):
    for gradients, alone in ranks.run(2, gradients_of, make, wrap, reduction):
        torch.testing.assert_close(gradients, alone)
