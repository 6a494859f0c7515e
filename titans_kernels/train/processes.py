"""The processes of a run: one, or those that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among all."""

    rank: int
    count: int
    device: torch.device
    mesh: DeviceMesh | None = None  # all processes, the rows of a batch divided among them

    @property
    def first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            dist.barrier()

    def sum(self, x: Tensor) -> Tensor:
        """Over all processes."""
        if self.count > 1:
            dist.all_reduce(x)
        return x

    def from_first(self, find: Callable[[], T]) -> T:
        """What the first process finds; where it fails, all of them fail with its error."""
        if self.count == 1:
            return find()
        found: list[Any] = [None, None]
        if self.first:
            try:
                found[0] = find()
            except Exception as error:
                found[1] = error
        dist.broadcast_object_list(found, device=self.device)
        if found[1] is not None:
            raise found[1]
        return found[0]

    def own_rows(self, rows: int) -> range:
        """Those rows of a batch that this process reads."""
        if rows % self.count:
            raise ValueError(f"rows: got {rows}, takes a multiple of the {self.count} processes")
        share = rows // self.count
        return range(self.rank * share, (self.rank + 1) * share)

    def all_rows(self, own: Tensor) -> Tensor:
        """The rows of all processes as one tensor, of which this process holds its own."""
        return own if self.mesh is None else DTensor.from_local(own, self.mesh, [Shard(0)])


@contextmanager
def start(device: str = "auto") -> Iterator[Processes]:
    """Join the others, if there are any, and leave them at the end."""
    count, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    where = _device(device, local)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    if count == 1:
        yield Processes(0, 1, where)
        return
    dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
    try:
        mesh = init_device_mesh(where.type, (count,), mesh_dim_names=("data",))
        yield Processes(dist.get_rank(), count, where, mesh)
    finally:
        dist.destroy_process_group()


def _device(device: str, local: int) -> torch.device:
    """The device of the process that is number `local` on its machine."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.device(device)
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", local)
    try:
        torch.empty(1, device=where)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: got {device!r}, takes one that is here: {reason}") from None
    return where
