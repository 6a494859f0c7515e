"""Checks that run in every process of a group: one group for many of them, since starting it is
most of what they cost."""

import datetime
import importlib
import multiprocessing
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

TIMEOUT = 60
# What takes seconds to import, once for all processes. Nothing of this project may be among it: a
# fault may be planted there.
PREPARED = [
    *("torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.tensor"),
    *("transformers.modeling_utils", "transformers.generation", "triton", "pytest"),
]


def selected(request, checks):
    """Those that a test of this run is about: the others need not be run for it."""
    params = (getattr(item, "callspec", None) for item in request.session.items)
    wanted = {call.params.get("check") for call in params if call}
    return [check for check in checks if check in wanted]


def run(checks, count, folder):
    """Run functions of (rank, folder) in turn in `count` processes.

    Returns:
        For each name None, or what the processes that failed had to say. What comes after a failure
        is not run: the processes are out of step.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    names = [(check.__module__, check.__name__) for check in checks]
    mutants = sys.modules.get("mutants")
    fault = mutants and mutants.planted
    multiprocessing.set_forkserver_preload(PREPARED)
    torch.multiprocessing.start_processes(
        _work, (names, count, str(folder), fault), nprocs=count, start_method="forkserver"
    )
    found = dict.fromkeys((check.__name__ for check in checks), "not run: one before it failed")
    for rank in range(count):
        for name, error in torch.load(Path(folder, f"{rank}.pt")).items():
            if error is not None:
                found[name] = f"{found[name] or ''}\nrank {rank}: {error}"
            elif rank == 0:
                found[name] = None
    return found


def _work(rank, names, count, folder, fault):
    timeout = TIMEOUT
    if fault is not None:
        sys.modules["mutants"].plant(fault)
        timeout = 15  # many end in a wait for what never comes
    checks = [getattr(importlib.import_module(module), name) for module, name in names]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=count,
        timeout=datetime.timedelta(seconds=timeout),
    )
    found = {}
    for check in checks:
        try:
            check(rank, folder)
            dist.barrier()
            found[check.__name__] = None
        except BaseException:
            found[check.__name__] = traceback.format_exc()
            break
    torch.save(found, Path(folder, f"{rank}.pt"))
    # Without leaving in step: another process may wait where this one has failed.
    os._exit(0)
