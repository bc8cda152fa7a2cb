"""Several processes of one torch.distributed group on this machine, for tests.

The processes are forked from one that has imported torch already, so that starting them is cheap; what they run must
stand in a module that they can import, not in a test's.
"""

import multiprocessing
import os
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

_TIMEOUT = 120  # seconds; of a collective that a failed rank no longer takes part in


def _context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "gunn_ext.training"])
    return context


def _work(function, rank, size, folder, arguments):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    store = dist.FileStore(os.path.join(folder, "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=_TIMEOUT))
    path = os.path.join(folder, str(rank))
    try:
        torch.save(function(*arguments), path + ".pt")
    except BaseException:
        with open(path + ".error", "w") as file:
            traceback.print_exc(file=file)
    finally:
        dist.destroy_process_group()


def run_ranks(function, size, folder, *arguments):
    """Calls ``function(*arguments)`` on ``size`` ranks, one thread each; returns the results in their order."""
    folder.mkdir()
    make = _context().Process
    ranks = [make(target=_work, args=(function, rank, size, str(folder), arguments)) for rank in range(size)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    errors = [file.read_text() for file in sorted(folder.glob("*.error"))]
    assert not errors, "\n".join(errors)
    assert all(rank.exitcode == 0 for rank in ranks)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]
