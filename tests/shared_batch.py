"""What the ranks of tests/test_synchronized.py run, and what one process runs with the whole batch."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gunn_ext import GunnLayer, ReferenceGunnLayer, SynchronizedBatchNorm, convert_sync_batchnorm

STEPS = 5


def make_model():
    """Every kind of layer that has batch statistics, in float64."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(2, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        GunnLayer(12, 3, shortcut=True),
        nn.Conv2d(12, 8, 1, bias=False),
        nn.BatchNorm2d(8, momentum=None, affine=False),
        GunnLayer(8, 4, units=2, residual=False, momentum=None),
        GunnLayer(8, 2, gradual=False, shortcut=True),
        ReferenceGunnLayer(8, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.BatchNorm1d(8),
        nn.Linear(8, 4),
    )
    return model.double()


def make_batches(count):
    generator = torch.Generator().manual_seed(7)
    for _ in range(STEPS):
        images = torch.randn(count, 2, 5, 6, dtype=torch.float64, generator=generator)
        yield images, torch.randint(4, (count,), generator=generator)


def train(model, batches, own=lambda tensor: tensor, scale=1.0):
    """Steps of SGD; ``own`` takes a rank's part of a batch. Returns the state and what became of the images."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)
    gradients = []
    for images, labels in batches:
        inputs = own(images).clone().requires_grad_()
        loss = F.cross_entropy(model(inputs), own(labels), reduction="sum") * scale / len(images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        gradients.append(inputs.grad / scale)
    return {name: value.clone() for name, value in model.state_dict().items()}, gradients


def train_on_ranks(sizes):
    """Train on parts of the given sizes; returns state, the parts' gradients and what kinds of batch norm there are."""
    rank = dist.get_rank()
    model = convert_sync_batchnorm(make_model())
    kinds = sorted(type(module).__name__ for module in model)
    parallel = DistributedDataParallel(model)
    start = sum(sizes[:rank])
    state, gradients = train(
        parallel, make_batches(sum(sizes)), lambda tensor: tensor[start : start + sizes[rank]], float(len(sizes))
    )
    check_modes_that_share_nothing(model)
    return {name.removeprefix("module."): value for name, value in state.items()}, gradients, kinds


def check_modes_that_share_nothing(model):
    """Evaluation and frozen batch norm run on one rank alone: they would wait for the other ranks otherwise."""
    if dist.get_rank() == 0:
        images = next(make_batches(2))[0]
        model.eval()
        model(images)
        model.train()
        for module in model:
            if isinstance(module, SynchronizedBatchNorm):
                module.eval()
            elif isinstance(module, (GunnLayer, ReferenceGunnLayer)):
                module.freeze_batch_norm()
        model(images).sum().backward()


def check_narrow(dtype):
    """One layer in other dtypes and memory formats: each rank's y, gradient of x and statistics, mean of gradients."""
    torch.manual_seed(1)
    layer = GunnLayer(12, 3, shortcut=True, recompute=False, dtype=dtype)
    x, grad = (torch.randn(6, 12, 4, 5).to(dtype).to(memory_format=torch.channels_last) for _ in "xg")
    if dist.is_initialized():
        convert_sync_batchnorm(layer)
        rank, size = dist.get_rank(), dist.get_world_size()
        x, grad = x.tensor_split(size)[rank], grad.tensor_split(size)[rank]
    x.requires_grad_()
    y = layer(x)
    y.backward(grad)
    assert y.is_contiguous(memory_format=torch.channels_last)
    gradients = [p.grad.float() for p in layer.parameters()]
    if dist.is_initialized():
        for gradient in gradients:
            dist.all_reduce(gradient)
    return y.detach(), x.grad, gradients, [b.clone() for b in layer.buffers()]


def check_errors():
    """What the ranks cannot do together raises on each of them."""
    rank = dist.get_rank()
    x = torch.randn(2, 12, 4, 4)

    different = convert_sync_batchnorm(GunnLayer(12, 3 if rank == 0 else 4))
    with pytest.raises(RuntimeError, match=r"rank 0 has GunnLayer\(12, segments=3, .*; rank 1 has .*segments=4"):
        different(x)
    other = convert_sync_batchnorm(nn.Sequential(GunnLayer(12, 3) if rank == 0 else nn.BatchNorm2d(12)))
    with pytest.raises(RuntimeError, match=r"rank 0 has GunnLayer\(.*; rank 1 has SynchronizedBatchNorm\(12, .*same m"):
        other(x)

    for module in (GunnLayer(12, 3), GunnLayer(12, 3, gradual=False), ReferenceGunnLayer(12, 3), nn.BatchNorm2d(12)):
        with pytest.raises(ValueError, match="at least one value per channel on every rank"):
            convert_sync_batchnorm(module)(x[:0])
        assert convert_sync_batchnorm(module)(x[:1, :, :1, :1]).shape == (1, 12, 1, 1)  # two values on two ranks

    group = dist.new_group([0])
    for module in (GunnLayer(12, 3), nn.BatchNorm2d(12)):
        alone = convert_sync_batchnorm(module, group)
        if rank == 0:
            assert alone(x).shape == x.shape
        else:
            with pytest.raises(RuntimeError, match="rank 1 is not in the process group"):
                alone(x)

    model = nn.Sequential(nn.BatchNorm2d(12), GunnLayer(12, 3))
    torched = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    with pytest.raises(RuntimeError, match=r"gunn_ext.convert_sync_batchnorm\(model\) instead"):
        torched[1](x)
    torched.eval()(x)
    assert convert_sync_batchnorm(torched)[1].train()(x).shape == x.shape
    assert isinstance(torched[0], nn.SyncBatchNorm)
    assert GunnLayer(12, 3)(x).shape == x.shape  # not converted by anyone: local, as ordinary batch norm is


def check_all(sizes, dtypes):
    """All of the above in one start of the ranks."""
    trained = train_on_ranks(sizes)
    narrow = [check_narrow(dtype) for dtype in dtypes]
    if len(sizes) == 2:
        check_errors()
    return trained, narrow
