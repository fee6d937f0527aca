"""DDP and FSDP2: ranks that have other rows together compute the gradients of all; and λ reaches what is wrapped."""

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


def wrapped(model, wrap, group):
    if wrap == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model, process_group=group)
    from torch.distributed.fsdp import fully_shard  # slow to import

    mesh = torch.distributed.device_mesh.DeviceMesh.from_group(group, torch.get_default_device().type)
    fully_shard(model.head.linear if wrap == "fsdp2 of the layer" else model.head, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def gradients_of(group, make, wrap, reduction):
    """Those of a model whose rows are shared by the ranks, and of the same model alone."""
    torch.manual_seed(0)
    model, alone = Model(make, reduction=reduction), Model(make)
    alone.load_state_dict(model.state_dict())
    x, y = torch.randn(6, 8), torch.randint(21, (6,))
    alone(x, y).backward()
    parallel = wrapped(model, wrap, group)
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


def scheduled(group, make, wrap):
    """Losses before and after a step of a schedule that knows the criterion alone, and what they are to be."""

    def seeded(**options):
        torch.manual_seed(0)
        return Model(make, **options)

    model = seeded()
    criterion = model.head.criterion if make is Plain else model.head
    parallel = wrapped(model, wrap, group)
    x, y = torch.randn(6, 8), torch.randint(21, (6,))
    losses = []
    with torch.no_grad():
        for reg_weight in (1.0, 0.25):
            criterion.reg_weight = reg_weight
            losses += parallel(x, y), seeded(reg_weight=reg_weight)(x, y)
    return losses


@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
@pytest.mark.parametrize("make", [Plain, linear])
def test_a_schedule_of_the_criterion_reaches_it(make, wrap, ranks):
    for first, first_expected, second, second_expected in ranks.run(2, scheduled, make, wrap):
        torch.testing.assert_close((first, second), (first_expected, second_expected))
        assert first != second
