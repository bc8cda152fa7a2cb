"""Processes that share batch statistics: what they exchange, and batch norm over the batch of all of them.

Statistics travel as float64 and are combined in the order of the ranks, so every rank computes the same bits. Nothing
here waits for a GPU, except for the one comparison of what the ranks are about to share.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def initialized() -> bool:
    """Whether this process belongs to a process group of torch.distributed."""
    return dist.is_available() and dist.is_initialized()


def several_processes() -> bool:
    """Whether this process belongs to a process group of torch.distributed with others in it."""
    return initialized() and dist.get_world_size() > 1


class Ranks:
    """The processes that share the batch statistics of one module.

    Args:
        group: A process group of torch.distributed; None is all processes.
    """

    def __init__(self, group: Any = None) -> None:
        """Note the group; nothing is exchanged yet."""
        self.group = group
        self._agreed = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        """Itself: a copied module shares with the same processes, and a group cannot be copied."""
        return self

    def present(self, owner: str) -> Ranks | None:
        """These ranks where there are several, None where this process is alone.

        Args:
            owner: The module that asks, for errors.

        Raises:
            RuntimeError: There is no process group, or this process is not in it.
        """
        if not initialized():
            raise RuntimeError(
                f"{owner}: its batch norm is synchronised, but this process belongs to no process group; start it with "
                "torchrun and call torch.distributed.init_process_group() first, or leave out convert_sync_batchnorm()."
            )
        if dist.get_rank(self.group) < 0:
            raise RuntimeError(
                f"{owner}: rank {dist.get_rank()} is not in the process group that its batch norm is synchronised "
                "over; convert the module with a group that this rank belongs to."
            )
        return self if dist.get_world_size(self.group) > 1 else None

    def gather(self, local: Tensor) -> Tensor:
        """The tensors of all ranks, stacked in their order; ``local`` has the same shape and dtype on each."""
        local = local.contiguous()
        gathered = [torch.empty_like(local) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(gathered, local, group=self.group)
        return torch.stack(gathered)

    @torch.compiler.disable
    def agree(self, description: str, device: torch.device) -> None:
        """Compare, once, what the ranks are about to share.

        Raises:
            RuntimeError: They disagree; raised on every rank.
        """
        if self._agreed:
            return
        size = 256
        text = description.encode()[:size].ljust(size)
        gathered = self.gather(torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device))
        theirs = [bytes(row.tolist()).decode(errors="replace").rstrip() for row in gathered.cpu()]
        if len(set(theirs)) > 1:
            listed = "; ".join(f"rank {rank} has {text}" for rank, text in enumerate(theirs))
            raise RuntimeError(
                f"ranks that synchronise their batch norm must run the same modules in the same order, but {listed}. "
                "Build the same model on every rank."
            )
        self._agreed = True

    def share(self, count: int, device: torch.device) -> SharedStatistics:
        """Begin a pass in which this rank has ``count`` values per channel.

        Raises:
            ValueError: ``count`` is 0.
        """
        if count == 0:
            raise ValueError(
                "synchronised batch norm needs at least one value per channel on every rank, and this one has an empty "
                "batch; give every rank an image."
            )
        return SharedStatistics(self, count, device)


class SharedStatistics:
    """One pass of a module through the batch of all ranks.

    Args:
        ranks: Who shares.
        count: Values per channel on this rank.
        device: Of the statistics.

    Attributes:
        total: Values per channel on all ranks, ``()`` float64.
    """

    def __init__(self, ranks: Ranks, count: int, device: torch.device) -> None:
        """Exchange the counts."""
        self._ranks = ranks
        local = torch.full((), count, dtype=torch.float64, device=device)
        counts = ranks.gather(local)
        self.total = counts.sum()
        self._weights = counts / self.total
        self.share = local / self.total

    def combine(self, statistics: Tensor) -> Tensor:
        """Mean and biased variance over all ranks, exact for unequal counts too.

        Args:
            statistics: ``(2, …)``: mean and biased variance of this rank.

        Returns:
            ``(2, …)`` float64.
        """
        gathered = self._ranks.gather(statistics.to(torch.float64))
        means, variances = gathered.unbind(1)
        weights = self._weights.view(-1, *(1 for _ in statistics.shape[1:]))
        mean = (weights * means).sum(0)
        return torch.stack([mean, (weights * (variances + (means - mean) ** 2)).sum(0)])

    def sum(self, sums: Tensor) -> Tensor:
        """``sums`` added up over all ranks, as float64."""
        return self._ranks.gather(sums.to(torch.float64)).sum(0)


class _BatchNorm(torch.autograd.Function):
    """Batch norm with the statistics of all ranks.

    Both passes are those with given statistics, whose kernels torch has for every device; the backward adds what the
    statistics' own dependence on the input contributes.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float, shared: Any
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps, ctx.shared = eps, shared
        return torch.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var = ctx.saved_tensors
        grad_x, products, sums = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        if ctx.needs_input_grad[0]:
            means = (ctx.shared.sum(torch.stack([sums, products])) / ctx.shared.total).to(mean.dtype)
            shape = (1, -1, *(1 for _ in x.shape[2:]))
            inverse = torch.rsqrt(var + ctx.eps)
            slope = weight.to(mean.dtype) * inverse
            along = (slope * inverse * means[1]).view(shape)
            offset = torch.addcmul((slope * means[0]).view(shape), x.to(mean.dtype) - mean.view(shape), along)
            grad_x = (grad_x - offset).to(x.dtype)
        return grad_x, products, sums, None, None, None, None


@torch.compiler.disable
def shared_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    factor: float,
    eps: float,
    ranks: Ranks,
) -> Tensor:
    """``torch.nn.functional.batch_norm`` in training, over the batch of all ranks.

    Args:
        x: ``(B, C, …)``, floating point; ranks may have different B and sizes.
        running_mean: ``(C,)``, updated in place; None keeps none.
        running_var: Likewise.
        weight: ``(C,)``.
        bias: ``(C,)``.
        factor: Weight of this batch in the running statistics.
        eps: Added to the variance.
        ranks: Who shares.

    Returns:
        Like ``x``.

    Raises:
        ValueError: This rank has an empty batch.
    """
    with torch.no_grad():
        shared = ranks.share(x.numel() // x.shape[1], x.device)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        var, mean = torch.var_mean(wide, [d for d in range(x.dim()) if d != 1], correction=0)
        mean, var = combined = shared.combine(torch.stack([mean, var]))
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), factor)
            running_var.lerp_((var * (shared.total / (shared.total - 1))).to(running_var.dtype), factor)
        mean, var = combined.to(wide.dtype)
    return _BatchNorm.apply(x, weight, bias, mean, var, eps, shared)


def batch_norm(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor,
    bias: Tensor,
    training: bool,
    factor: float,
    eps: float,
    ranks: Ranks | None,
) -> Tensor:
    """``torch.nn.functional.batch_norm``; in training over the batch of ``ranks``, where there are any."""
    if training and ranks is not None:
        return shared_batch_norm(x, running_mean, running_var, weight, bias, factor, eps, ranks)
    return F.batch_norm(x, running_mean, running_var, weight, bias, training, factor, eps)
