"""Checks that run in every process of a group: one group for many of them, since starting it is
most of what they cost."""

import datetime
import os
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

TIMEOUT = 60


def run(checks, count, folder):
    """Run functions of (rank, folder) in turn in `count` processes.

    Returns:
        For each name None, or what the first process that failed had to say. What comes after a
        failure is not run: the processes are out of step.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(_work, (checks, count, str(folder)), nprocs=count)
    found = {check.__name__: "not run: a check before it failed" for check in checks}
    for rank in range(count):
        for name, error in torch.load(Path(folder, f"{rank}.pt")).items():
            if error is None and found[name] and found[name].startswith("not run"):
                found[name] = None
            elif error is not None:
                found[name] = f"{found[name] or ''}\nrank {rank}: {error}"
    return found


def _work(rank, checks, count, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=count,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )
    found = {}
    for check in checks:
        try:
            check(rank, folder)
            dist.barrier()
            found[check.__name__] = None
        except Exception:
            found[check.__name__] = traceback.format_exc()
            break
    torch.save(found, Path(folder, f"{rank}.pt"))
    # Without leaving in step: another process may wait where this one has failed.
    os._exit(0)
