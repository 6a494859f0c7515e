"""Tensors from rank to rank: point to point, with gradients that go the other way."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from .border import Border

HEADER = 2048  # bytes


class Line:
    """This rank among those of a group, in their order.

    Messages between two ranks are matched by their order, which is that of the calls in both; those
    of the gradients are in the opposite order. A message of several tensors is one of their bytes.
    """

    # Of all lines: a message is lost with its tensor, and may outlive the layer that has sent it.
    _sent: ClassVar[list[tuple[Any, Tensor, _Peer]]] = []

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.count = group, dist.get_rank(group), dist.get_world_size(group)

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def last(self) -> bool:
        return self.rank == self.count - 1

    def put(self, tensors: Sequence[Tensor], to: int) -> None:
        """Send; returns at once."""
        message = _bytes(tensors)
        self._sent[:] = [sent for sent in self._sent if not sent[0].is_completed()]
        if message.numel():
            message = message.to(self._wire(message.device))
            with _Peer(self, to, "take") as peer:
                work = dist.isend(message, group=self.group, group_dst=to)
            self._sent.append((work, message, peer))

    def take(self, like: Sequence[Tensor], source: int) -> list[Tensor]:
        """Receive tensors of these shapes, dtypes and device."""
        message = _bytes(like)
        if message.numel():
            received = torch.empty_like(message, device=self._wire(message.device))
            with _Peer(self, source, "send"):
                work = dist.irecv(received, group=self.group, group_src=source)
                work.wait()  # type: ignore[union-attr]
            message = received.to(message.device)
        return _from_bytes(message, like)

    def flush(self) -> None:
        """Until everything that was sent has been received."""
        for work, _, peer in self._sent:
            with peer:
                work.wait()
        self._sent.clear()

    def put_facts(self, facts: dict[str, Any], to: int, device: torch.device) -> None:
        self.put([_header(facts, self._device(device))], to)

    def take_facts(self, source: int, device: torch.device) -> dict[str, Any]:
        like = torch.empty(HEADER, dtype=torch.uint8, device=self._device(device))
        (message,) = self.take([like], source)
        return _facts(message)

    def gather_facts(self, facts: dict[str, Any], device: torch.device) -> list[dict[str, Any]]:
        """Those of all ranks."""
        own = _header(facts, self._device(device))
        found = [torch.empty_like(own) for _ in range(self.count)]
        dist.all_gather(found, own, group=self.group)
        return list(map(_facts, found))

    @property
    def on_cpu(self) -> bool:
        """Whether the group has a backend for the CPU."""
        try:
            self.group._get_backend(torch.device("cpu"))
        except RuntimeError:
            return False
        return True

    def _wire(self, device: torch.device) -> torch.device:
        """Where messages lie: gloo sends and receives tensors of the CPU alone."""
        if device.type != "cpu" and self.group._get_backend(device).name() == "gloo":
            return torch.device("cpu")
        return device

    def _device(self, device: torch.device) -> torch.device:
        """The CPU where that is possible: nothing then waits for a GPU."""
        return torch.device("cpu") if self.on_cpu else device

    def name(self, rank: int) -> str:
        """A rank of the group, as its process is known everywhere."""
        everywhere = dist.get_global_rank(self.group, rank)
        return f"rank {everywhere} ({rank + 1} of {self.count} that share a layer)"


def _header(facts: dict[str, Any], device: torch.device) -> Tensor:
    text = json.dumps(facts).encode()
    if len(text) > HEADER:
        raise ValueError(f"facts: got {len(text)} bytes, takes at most {HEADER}")
    return torch.frombuffer(bytearray(text.ljust(HEADER)), dtype=torch.uint8).to(device)


def _facts(header: Tensor) -> dict[str, Any]:
    return json.loads(bytes(header.tolist()))


class _Peer:
    """Errors while waiting for a rank name it."""

    def __init__(self, line: Line, rank: int, what: str) -> None:
        self.line, self.rank, self.what = line, rank, what

    def __enter__(self) -> _Peer:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, RuntimeError):
            peer, own = self.line.name(self.rank), self.line.name(self.line.rank)
            raise RuntimeError(
                f"{peer} did not {self.what} a message that {own} waited for: it has ended, hangs, "
                f"or made other calls ({str(error).splitlines()[0]})"
            ) from error


def _bytes(tensors: Sequence[Tensor]) -> Tensor:
    """All as one tensor of bytes, wide dtypes first: each begins at a multiple of its size."""
    ordered = sorted(tensors, key=lambda x: -x.element_size())
    # One row of an expanded tensor is contiguous, whatever its stride: not to `view`.
    flat = [
        x.detach().contiguous().as_strided((x.numel(),), (1,)).view(torch.uint8) for x in ordered
    ]
    return torch.cat(flat) if flat else torch.empty(0, dtype=torch.uint8)


def _from_bytes(message: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    order = sorted(range(len(like)), key=lambda i: -like[i].element_size())
    parts = message.split([like[i].numel() * like[i].element_size() for i in order])
    found: list[Tensor] = list(like)
    for i, part in zip(order, parts, strict=True):
        found[i] = part.view(like[i].dtype).view(like[i].shape)
    return found


def _floating(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x for x in tensors if x.is_floating_point()]


# ------------------------------------------------------------------------- with gradients

# Every node has an input with a gradient: whether a rank sends one must not depend on its own.


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, line: Line, *tensors: Tensor) -> Tensor:
        ctx.line, ctx.kinds = line, [x.is_floating_point() for x in tensors]
        ctx.like = [torch.empty_like(x, device="meta") for x in _floating(tensors)]
        ctx.device = anchor.device
        line.put(tensors, line.rank + 1)
        return anchor.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Any, ...]:
        like = [torch.empty(x.shape, dtype=x.dtype, device=ctx.device) for x in ctx.like]
        grads = iter(ctx.line.take(like, ctx.line.rank + 1))
        return None, None, *(next(grads) if floating else None for floating in ctx.kinds)


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, line: Line, *like: Tensor) -> tuple[Tensor, ...]:
        found = line.take(like, line.rank - 1)
        ctx.line, ctx.kinds = line, [x.is_floating_point() for x in like]
        ctx.mark_non_differentiable(*(x for x in found if not x.is_floating_point()))
        return anchor.new_zeros(()), *found

    @staticmethod
    def backward(ctx: Any, _: Tensor, *grads: Tensor) -> tuple[Any, ...]:
        wanted = [x for x, floating in zip(grads, ctx.kinds, strict=True) if floating]
        ctx.line.put(wanted, ctx.line.rank - 1)
        return None, None, *[None] * len(grads)


class _Share(torch.autograd.Function):
    """From the last rank to all, a message for each dtype."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, line: Line, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.line, found = line, list(tensors)
        ctx.kinds = [x.is_floating_point() for x in tensors]
        for of in _by_dtype(tensors):
            flat = torch.cat([tensors[i].detach().flatten() for i in of])
            with _Peer(line, line.count - 1, "send"):
                dist.broadcast(flat, group=line.group, group_src=line.count - 1)
            for i, x in zip(of, flat.split([tensors[i].numel() for i in of]), strict=True):
                found[i] = x.view(tensors[i].shape)
        ctx.mark_non_differentiable(*(x for x in found if not x.is_floating_point()))
        return anchor.new_zeros(()), *found

    @staticmethod
    def backward(ctx: Any, _: Tensor, *grads: Tensor) -> tuple[Any, ...]:
        line, found = ctx.line, [None] * len(grads)
        for of in _by_dtype(grads):
            of = [i for i in of if ctx.kinds[i]]
            if not of:
                continue
            flat = torch.cat([grads[i].flatten() for i in of])
            with _Peer(line, line.count - 1, "take"):
                dist.reduce(flat, group=line.group, group_dst=line.count - 1)
            if line.last:
                for i, x in zip(of, flat.split([grads[i].numel() for i in of]), strict=True):
                    found[i] = x.view(grads[i].shape)
        return None, None, *found


def _by_dtype(tensors: Sequence[Tensor]) -> list[list[int]]:
    """The places of the tensors of each dtype."""
    places: dict[torch.dtype, list[int]] = {}
    for i, x in enumerate(tensors):
        places.setdefault(x.dtype, []).append(i)
    return list(places.values())


class _Tie(torch.autograd.Function):
    """x, from whose gradient that of the tokens follows: backward reaches what gave them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *tokens: Tensor) -> Tensor:
        # Saved, so that activation checkpointing recomputes as far as this: all messages are sent.
        ctx.save_for_backward(*tokens)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Any, ...]:
        return dx, *(torch.zeros_like(token) for token in ctx.saved_tensors)


class Relay:
    """States of a call: from the rank before, and to the rank behind.

    `open` during the call, `fresh` if its sequences begin in it; the borders to the rank before and
    the rank behind.
    """

    def __init__(self, line: Line) -> None:
        self.line, self.open, self.fresh = line, False, True
        self.before, self.behind = Border(), Border()
        self._tokens: list[Tensor] = []

    def receives(self, reset_every: int | None = None) -> bool:
        """Whether a state of a memory with such resets comes from the rank before."""
        return self.open and not self.line.first and self.before.crossed(reset_every)

    def receive(self, state: Any, reset_every: int | None = None) -> Any:
        """The state, of its shapes, from the rank before; where none comes, the state itself."""
        if not self.receives(reset_every):
            return state
        return self.before.replace(state, self._run(_Receive, self.before.select(state)))

    def send(self, state: Any, reset_every: int | None = None) -> None:
        """To the rank behind, if there is one that needs it."""
        if not self.open or self.line.last or not self.behind.crossed(reset_every):
            return
        leaves, _ = pytree.tree_flatten(self.behind.select(state))
        self._tokens.append(_Send.apply(self._anchor(leaves), self.line, *leaves))

    def share(self, state: Any) -> Any:
        """The last rank's state on all."""
        return self._run(_Share, state)

    def tie(self, x: Tensor, *unused: Tensor) -> Tensor:
        """x, whose backward pass includes all messages so far, and gives `unused` a gradient."""
        tokens, self._tokens = [*self._tokens, *unused], []
        return _Tie.apply(x, *tokens) if tokens else x

    def starts(self, *parameters: Tensor) -> tuple[Tensor, ...]:
        """Those with which sequences start: the first rank alone uses them, where they begin.

        Ranks that reduce their gradients together need one on all of them, or on none.
        """
        return parameters if self.fresh else ()

    def _run(self, function: Any, state: Any) -> Any:
        leaves, spec = pytree.tree_flatten(state)
        token, *found = function.apply(self._anchor(leaves), self.line, *leaves)
        self._tokens.append(token)
        return pytree.tree_unflatten(found, spec)

    def _anchor(self, leaves: list[Tensor]) -> Tensor:
        return torch.zeros((), device=leaves[0].device, requires_grad=torch.is_grad_enabled())
