"""The processes of a run: one, or those that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..distributed.lost import naming_the_lost
from .config import MESH

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among all."""

    rank: int
    count: int
    device: torch.device
    mesh: DeviceMesh | None = None  # all of them, by data, length and heads
    background: dist.ProcessGroup | None = None  # all of them, for another thread

    @property
    def first(self) -> bool:
        return self.rank == 0

    def place(self, name: str) -> tuple[int, int]:
        """This process among those along a dimension of the mesh, and how many these are."""
        if self.mesh is None:
            return (self.rank, self.count) if name == "data" else (0, 1)
        part = self.mesh[name]
        return part.get_local_rank(), part.size()

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            dist.barrier()

    def sum(self, x: Tensor, *names: str) -> Tensor:
        """Over the processes along these dimensions of the mesh."""
        for name in names:
            if self.mesh is not None:
                dist.all_reduce(x, group=self.mesh[name].get_group())
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

    def agree(self, given: dict[str, Any]) -> None:
        """What all processes have to be given alike.

        Raises:
            ValueError: on all of them, naming what differs, on which rank.
        """
        if self.count == 1:
            return
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, given)
        for rank, theirs in enumerate(found):
            for name in {**found[0], **theirs}:
                got, takes = theirs.get(name), found[0].get(name)
                if got != takes:
                    raise ValueError(
                        f"{name}: got {got!r} on rank {rank}, takes {takes!r}, as on rank 0"
                    )

    def own_rows(self, rows: int) -> range:
        """Those rows of a batch that this process reads."""
        rank, count = self.place("data")
        if rows % count:
            raise ValueError(f"rows: got {rows}, takes a multiple of the {count} processes")
        share = rows // count
        return range(rank * share, (rank + 1) * share)

    def own_tokens(self, length: int) -> slice:
        """Those tokens of a row that this process reads."""
        rank, count = self.place("length")
        return slice(length * rank // count, length * (rank + 1) // count)

    def whole(self, own: Tensor, heads: int | None) -> Tensor:
        """The rows and heads of all processes as one tensor, of which this one holds its own.

        Args:
            heads: the dimension of the heads, if there are some; rows are in the first.
        """
        if self.mesh is None:
            return own
        over_heads = Replicate() if heads is None else Shard(heads)
        return DTensor.from_local(own, self.mesh, [Shard(0), Replicate(), over_heads])


@contextmanager
def start(
    device: str = "auto", mesh: Mapping[str, int] | None = None, timeout: float = 600.0
) -> Iterator[Processes]:
    """Join the others, if there are any, and leave them at the end.

    Args:
        mesh: how many processes divide "data", "length" and "heads"; by default all divide data.
        timeout: seconds that one waits for another.

    Raises:
        RuntimeError: in a process that waited for one that is lost, naming its rank.
    """
    count, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    sizes = _sizes(count, mesh or {})
    where = _device(device, local)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    if count == 1:
        yield Processes(0, 1, where)
        return
    # Both backends: messages between processes besides tensors then wait for no GPU.
    backend = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    try:
        Processes(dist.get_rank(), count, where).agree({"mesh": sizes})
        all_of_them = init_device_mesh(where.type, sizes, mesh_dim_names=MESH)
        with naming_the_lost():
            background = dist.new_group(backend="gloo")
            yield Processes(dist.get_rank(), count, where, all_of_them, background)
    finally:
        dist.destroy_process_group()


def _sizes(count: int, mesh: Mapping[str, int]) -> tuple[int, int, int]:
    """Of the mesh, whose data is what is left if it is not given."""
    length, heads = mesh.get("length", 1), mesh.get("heads", 1)
    data = mesh.get("data", max(1, count // (length * heads)))
    if data * length * heads != count:
        raise ValueError(
            f"mesh: got data {data} x length {length} x heads {heads}, takes a product of {count}, "
            "the number of processes"
        )
    return data, length, heads


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
