"""Checks that run in every process of a group: one group for many of them, since starting it is
most of what they cost."""

import datetime
import importlib
import multiprocessing.connection
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

TIMEOUT = 60
OF_FAULTS = 15  # many end in a wait for what never comes
DEVICE = torch.device("cpu")  # of the tensors of this process
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


def backend(device, count):
    """NCCL where every process has a GPU to itself, else gloo.

    "Using the same CUDA device multiple times as different ranks of the same NCCL communicator is
    not supported and may lead to hangs" (NCCL user guide, Creating a Communicator).
    """
    if device == "cpu":
        return "gloo"
    return "cpu:gloo,cuda:nccl" if torch.cuda.device_count() >= count else "cpu:gloo,cuda:gloo"


def start(function, *args):
    """A process that calls a function, forked from one that has PREPARED: seconds less to wait."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PREPARED)
    process = context.Process(target=function, args=args, daemon=True)
    process.start()
    return process


def run(checks, count, folder, device="cpu"):
    """Run functions of (rank, folder) in turn in `count` processes.

    Args:
        device: "cpu" or "cuda", of DEVICE in each of them.

    Returns:
        For each name None, or what the processes that failed had to say. What comes after a failure
        is not run: the processes are out of step.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    names = [(check.__module__, check.__name__) for check in checks]
    mutants = sys.modules.get("mutants")
    fault = mutants and mutants.planted
    timeout = TIMEOUT if fault is None else OF_FAULTS
    given = names, count, str(folder), fault, device, timeout
    workers = [start(_work, rank, *given) for rank in range(count)]
    multiprocessing.connection.wait([worker.sentinel for worker in workers])
    for worker in workers:  # they end together, or one has failed and others may wait for it
        worker.join(timeout)
        worker.kill()
    found = dict.fromkeys((check.__name__ for check in checks), "not run: one before it failed")
    for rank in range(count):
        path = Path(folder, f"{rank}.pt")
        for name, error in (torch.load(path) if path.exists() else {}).items():
            if error is not None:
                found[name] = f"{found[name] or ''}\nrank {rank}: {error}"
            elif rank == 0:
                found[name] = None
    return found


def _work(rank, names, count, folder, fault, device, timeout):
    global DEVICE
    if fault is not None:
        sys.modules["mutants"].plant(fault)
    checks = [getattr(importlib.import_module(module), name) for module, name in names]
    torch.set_num_threads(1)
    if device == "cuda":
        DEVICE = torch.device(device, rank % torch.cuda.device_count())
        torch.cuda.set_device(DEVICE)
        # What is compared is one process with many, not kernels: these have tests of their own.
        os.environ["TITANS_KERNELS_AUTO"] = "torch"
    dist.init_process_group(
        backend(device, count),
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
