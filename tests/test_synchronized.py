"""Synchronised batch norm: ranks that share a batch are one process with the whole of it."""

import copy
import pickle

import pytest
import torch
from processes import run_ranks
from shared_batch import check_all, check_narrow, make_batches, make_model, train
from torch import nn

from gunn_ext import GunnLayer, ReferenceGunnLayer, SynchronizedBatchNorm, convert_sync_batchnorm

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("sizes", [[3, 2], [1, 3, 2]], ids=str)
def test_ranks_are_one_process_with_the_whole_batch(sizes, tmp_path):
    """Unequal parts, every kind of layer, DistributedDataParallel; parameters, buffers and gradients of images."""
    state, gradients = train(make_model(), make_batches(sum(sizes)))
    narrow = [check_narrow(dtype) for dtype in DTYPES]
    results = run_ranks(check_all, len(sizes), tmp_path / "ranks", sizes, DTYPES)
    for (theirs, _, kinds), _ in results:
        assert kinds.count("SynchronizedBatchNorm") == 3
        assert not any(kind.startswith("BatchNorm") for kind in kinds)
        assert theirs.keys() == state.keys()
        for name, value in state.items():
            torch.testing.assert_close(theirs[name], value, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    for step, whole in enumerate(gradients):
        parts = torch.cat([parts[step] for (_, parts, _), _ in results])
        torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)

    for k, (dtype, (y, grad_x, grads, buffers)) in enumerate(zip(DTYPES, narrow, strict=True)):
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        ours = [narrow[k] for _, narrow in results]

        def assert_near(ours, whole, tolerance=tolerance):
            assert ours.dtype == whole.dtype
            assert (ours - whole).float().norm() <= tolerance * whole.float().norm()

        assert_near(torch.cat([part[0] for part in ours]), y)
        assert_near(torch.cat([part[1] for part in ours]), grad_x)
        for rank in ours:
            for mine, whole in zip([*rank[2], *rank[3]], [*grads, *buffers], strict=True):
                assert_near(mine, whole)


def test_conversion_keeps_tensors_modes_and_sharing():
    norm = nn.BatchNorm2d(8, eps=1e-3, momentum=None)
    twice = nn.Sequential(norm, ReferenceGunnLayer(8, 2))
    model = nn.Sequential(norm, GunnLayer(8, 4), twice, nn.BatchNorm2d(8).eval())
    model[0].weight.requires_grad_(False)
    before = model.state_dict(keep_vars=True)
    converted = convert_sync_batchnorm(model)
    assert converted is model
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert model[0] is model[2][0]
    assert isinstance(model[0], SynchronizedBatchNorm)
    assert (model[0].eps, model[0].momentum, model[0].training, model[3].training) == (1e-3, None, True, False)
    assert not model[0].weight.requires_grad
    assert "synchronized" in repr(model[1])
    again = convert_sync_batchnorm(copy.deepcopy(model))
    assert again.state_dict().keys() == before.keys()
    assert "synchronized" in repr(pickle.loads(pickle.dumps(model))[1])


def test_without_a_process_group_training_raises_and_evaluation_does_not():
    x = torch.randn(2, 8, 4, 4)
    for module in (GunnLayer(8, 4), GunnLayer(8, 4, gradual=False), ReferenceGunnLayer(8, 4), nn.BatchNorm2d(8)):
        converted = convert_sync_batchnorm(module)
        with pytest.raises(RuntimeError, match=r"belongs to no process group; start it with torchrun"):
            converted(x)
        assert converted.eval()(x).shape == x.shape


def test_torchs_conversion_changes_nothing_in_one_process():
    x = torch.randn(2, 8, 4, 4)
    layer = GunnLayer(8, 4)
    same = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(copy.deepcopy(layer)))
    assert torch.equal(same(x), layer(x))


def test_what_cannot_be_converted_raises():
    with pytest.raises(TypeError, match="expected a torch.nn.Module, got Parameter"):
        convert_sync_batchnorm(nn.Parameter(torch.zeros(1)))
    with pytest.raises(ValueError, match="run one batch through the model first"):
        convert_sync_batchnorm(nn.Sequential(nn.LazyBatchNorm2d()))
    with pytest.raises(ValueError, match=r"expected \(B, 8, …\), got shape \(2, 7, 4, 4\)"):
        convert_sync_batchnorm(nn.BatchNorm2d(8))(torch.zeros(2, 7, 4, 4))
