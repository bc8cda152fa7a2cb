"""Several processes that train one network: how they find each other, and what they agree on.

``torchrun`` starts them and tells each its place in the environment. Without it a run is a world of one process, in
which everything here is free.
"""

from __future__ import annotations

import atexit
import inspect
import os
import socket
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gunn_ext.data import Part
from gunn_ext.ranks import initialized
from gunn_ext.training.device import resolve_device
from gunn_ext.training.errors import ConfigError

T = TypeVar("T")

# Whether buffers of rank 0 are sent to the others before every pass; torch 2.13 renamed it.
_SYNC_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    else "broadcast_buffers"
)

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them.

    Numbers that they agree on travel through the CPUs, so that agreeing waits for no GPU.

    Attributes:
        device: Where this process computes.
        rank: Which process this is, counted from 0; 0 alone writes and reports.
        size: How many there are.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def part(self) -> Part:
        """This process's part of every batch and split."""
        return Part(self.rank, self.size)

    def own(self, split: Any) -> Any:
        """This process's part of a split, an `gunn_ext.data.dataset.AnySplit`."""
        if self.size == 1:
            return split
        everything = torch.arange(len(split), device=split.labels.device)
        return split.take(everything[self.part.range(len(split))])

    @property
    def is_main(self) -> bool:
        """Whether this process writes and reports."""
        return self.rank == 0

    def on_main(self, work: Callable[[], T]) -> T:
        """Do something on rank 0 alone; every rank gets what it returned, or raises what it raised."""
        if self.size == 1:
            return work()
        outcome: list = [None, None]
        if self.is_main:
            try:
                outcome[0] = work()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def total(self, values: Iterable[float]) -> list[float]:
        """Each value added up over all ranks; integers exactly up to 2**53, NaN where one rank has it."""
        summed = torch.tensor(list(values), dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(summed)
        return summed.tolist()

    def largest(self, value: int) -> int:
        """The largest value of all ranks."""
        if self.size == 1:
            return value
        found = torch.tensor(value)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def parallel(self, model: nn.Module) -> nn.Module:
        """``model`` with its gradients averaged over all ranks and rank 0's weights on each; itself for one process."""
        if self.size == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        # Running statistics are either synchronised with those of all ranks, or averaged where somebody looks at them.
        options: dict[str, Any] = {"device_ids": devices, "gradient_as_bucket_view": True, _SYNC_BUFFERS: False}
        return DistributedDataParallel(model, **options)

    @torch.no_grad()
    def average_statistics(self, model: nn.Module) -> None:
        """Replace the running statistics of batch norms, which each rank gathers on its own, by their mean."""
        if self.size == 1:
            return
        for name, buffer in model.named_buffers():
            if name.rpartition(".")[2] in ("running_mean", "running_var"):
                dist.all_reduce(buffer)
                buffer /= self.size


def without_exchange(network: object) -> AbstractContextManager:
    """While entered, gradients of a network of `World.parallel` stay with their rank; those of others always do."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext()


def unwrapped(model: nn.Module) -> nn.Module:
    """The network within DistributedDataParallel and torch.compile, whose names carry no prefix."""
    while True:
        if isinstance(model, (DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def join_world(device: str) -> World:
    """Meet the other processes of a run, if torchrun started this one.

    A process group that exists already is used; one that is made serves this process until it ends.

    Args:
        device: As in `Config`; ``auto`` and ``cuda`` give every process of a machine a GPU of its own.

    Raises:
        ConfigError: The environment is incomplete, there is no such device, or there are more processes than GPUs.
    """
    given = initialized()
    if not given and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return World(resolve_device(device))
    if not given:
        missing = [name for name in _ENVIRONMENT if not os.environ.get(name)]
        if missing:
            raise ConfigError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the environment lacks {', '.join(missing)}. Start the "
                "processes with torchrun, or unset WORLD_SIZE to train with this one alone."
            )
    where = _own_device(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    if not given:
        store, rank, size = next(dist.rendezvous("env://"))
        if os.environ.get("LOCAL_WORLD_SIZE") == str(size):
            # One agent has started all. What the store of its earlier attempts holds are addresses of dead processes.
            store = dist.PrefixStore(f"attempt {restarts()}", store)
        backend = "gloo" if where.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        atexit.register(dist.destroy_process_group)
    return World(where, dist.get_rank(), dist.get_world_size())


def _own_device(name: str) -> torch.device:
    device = resolve_device(name)
    if device.type != "cuda":
        return device
    if name not in ("auto", "cuda"):
        raise ConfigError(
            f"device {name!r} names one GPU for all processes; each needs its own: use device cuda or auto, and "
            "CUDA_VISIBLE_DEVICES to choose among them."
        )
    place, found = local_rank(), torch.cuda.device_count()
    if place >= found:
        raise ConfigError(
            f"process {place} of this machine (counted from 0) has no GPU: torch finds {found}. Start at most as many "
            "processes (torchrun --nproc-per-node), or use device cpu."
        )
    return torch.device("cuda", place)


def local_rank() -> int:
    """Which process of this machine this is, by torchrun's environment."""
    return int(os.environ.get("LOCAL_RANK", 0))


def launched_rank() -> int:
    """Which process of the run this is, by torchrun's environment; 0 without it."""
    return int(os.environ.get("RANK", 0))


def job_name() -> str | None:
    """What the processes of one call of torchrun have in common, restarts included; None without torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    # Without --rdzv-id several jobs may have the same name; the processes of one are started by the same agent.
    return f"{socket.gethostname()}/{os.getppid()}" if name == "none" else name


def restarts() -> int:
    """How often torchrun has started this run anew."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
