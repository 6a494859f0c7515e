"""Two lanes of one call, on streams that run as late, or as early, as their waits allow.

What a GPU does with two streams is any order that their waits leave open: here these orders are
run, with the kernels themselves, and any but the right results show that a wait is missing.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from functools import partial

import pytest
import torch
from inputs import make_inputs
from kernel_cases import Case, forced, inputs_of
from torch.utils import _pytree as pytree

import reference
from titans_kernels import neural_memory
from titans_kernels.kernels import operator
from titans_kernels.kernels.lanes import Lanes

ANY = torch.device("cpu")


class Event:
    def __init__(self) -> None:
        self.done = False


class Stream:
    """Does what it is given in order, each when it is told to go on."""

    def __init__(self, name: str) -> None:
        self.name, self.queue = name, deque[Event | Callable[[], None]]()

    def wait_event(self, event: Event) -> None:
        self.queue.append(event)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def record_event(self) -> Event:
        event = Event()
        self.queue.append(lambda: setattr(event, "done", True))
        return event

    def stands(self) -> bool:
        return bool(self.queue) and isinstance(self.queue[0], Event) and not self.queue[0].done

    def step(self) -> None:
        work = self.queue.popleft()
        if not isinstance(work, Event):
            work()


class Late(Lanes):
    """Lanes whose work is done at their end: what the caller's stream waits for, in some order."""

    order = "the caller first"

    def __init__(self, device: torch.device, turns: int) -> None:
        self.here, self.ahead = Stream("here"), Stream("ahead")
        self.random = random.Random(self.order)
        super().__init__(device, turns)

    def _current(self) -> Stream:
        return self.here

    def _stream(self, device: torch.device) -> Stream:
        return self.ahead

    def _run(self, stream: Stream, work: Callable[[], None]) -> None:
        stream.queue.append(work)

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        while self.here.queue:
            able = [x for x in (self.here, self.ahead) if x.queue and not x.stands()]
            assert able, "each waits for the other"
            if self.order == "the caller first":
                able[0].step()
            elif self.order == "ahead first":
                able[-1].step()
            else:
                self.random.choice(able).step()


ORDERS = ["the caller first", "ahead first", *(f"seed {i}" for i in range(3))]


@pytest.fixture(params=ORDERS)
def lanes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[Late]:
    monkeypatch.setattr(Late, "order", request.param)
    monkeypatch.setattr(operator, "Lanes", Late)
    return Late


def test_a_scratch_is_read_when_it_is_learned_and_learned_when_it_is_read(
    lanes: type[Late],
) -> None:
    scratch, log = [-1, -1], []

    def learn(i: int) -> None:
        assert log, "before the caller's own work"
        log.append(i)
        scratch[i % 2] = i

    def read(i: int) -> None:
        assert scratch[i % 2] == i
        log.append(-i)

    late = lanes(ANY, 2)
    late.here.queue.append(lambda: log.append(0))
    with late:
        for i in range(1, 8):
            late.learn(i % 2, lambda i=i: learn(i))
            late.read(i % 2, lambda i=i: read(i))
    assert [i for i in log if i > 0] == list(range(1, 8))
    assert [-i for i in log if i < 0] == list(range(1, 8))
    if lanes.order == "ahead first":  # by two at most, the scratches that there are
        assert log == [0, 1, 2, -1, 3, -2, 4, -3, 5, -4, 6, -5, 7, -6, -7]
    if lanes.order == "the caller first":
        assert log == [0, *(x for i in range(1, 8) for x in (i, -i))]


def test_all_is_learned_at_the_end_where_nothing_is_read(lanes: type[Late]) -> None:
    log: list[int] = []
    with lanes(ANY, 2) as late:
        for i in range(5):
            late.learn(i % 2, lambda i=i: log.append(i))
    assert log == list(range(5))


@pytest.mark.parametrize("error", [None, ValueError])
def test_the_caller_waits_whatever_happens(
    lanes: type[Late], error: type[Exception] | None
) -> None:
    log: list[int] = []
    try:
        with lanes(ANY, 2) as late:
            late.learn(0, lambda: log.append(1))
            if error is not None:
                raise error
    except ValueError:
        pass
    assert log == [1]


def test_with_one_scratch_all_is_done_in_order(lanes: type[Late]) -> None:
    log: list[str] = []
    with Lanes(ANY, 1) as here:
        here.learn(0, lambda: log.append("learned"))
        here.read(0, lambda: log.append("read"))
        assert log == ["learned", "read"]


# ------------------------------------------------------------------------------------ the kernels


CASES = {
    "chunks to a block": Case("", 50, 5, depth=1, group=1),
    "two blocks to a group": Case("", 70, 5, group=4),
    "a chunk over blocks": Case("", 70, 40, depth=1, group=3),
    "queries read as keys": Case("", 70, 40, depth=1, group=3, read="chunk"),
    "packed, some behind": Case("", 50, 5, depth=1, group=1, lengths=(33, 1, 16), past=(3, 20, 0)),
}


def _results(case: Case, gradients: bool) -> list[torch.Tensor]:
    """In float32, whose kernels are the same."""
    single = torch.float32
    inputs = pytree.tree_map(
        lambda x: x.to(single) if torch.is_tensor(x) and x.is_floating_point() else x,
        inputs_of(case),
    )
    inputs["v"].requires_grad_(gradients)
    with forced(case):
        o, state = neural_memory(**inputs, backend="triton", output_final_state=True)
    found = [o, *state.weights, *state.momentum]
    if gradients:
        found += torch.autograd.grad(o.square().sum() + state.weights[0].sum(), inputs["v"])
    return [x.detach() for x in found]


@pytest.mark.parametrize(
    "name, gradients",
    [*((name, False) for name in CASES), ("a chunk over blocks", True)],
)
def test_kernels_on_two_lanes_are_those_on_one(
    name: str, gradients: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    want = _results(case, gradients)
    turns = []

    def lanes(order: str, device: torch.device, count: int) -> Late:
        turns.append(count)
        late = Late(device, count)
        late.order, late.random = order, random.Random(order)
        return late

    for order in ORDERS[:3]:
        monkeypatch.setattr(operator, "Lanes", partial(lanes, order))
        for x, y in zip(_results(case, gradients), want, strict=True):
            assert torch.equal(x, y), order
    assert turns == [2] * 3


def test_what_queries_of_a_chunk_read_is_that_of_its_start() -> None:
    case = CASES["queries read as keys"]
    inputs = inputs_of(case)
    want, _ = reference.neural_memory(**inputs)
    with forced(case):
        o, _ = neural_memory(**inputs, backend="triton")
    torch.testing.assert_close(o, want, rtol=1e-10, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("gradients", [False, True], ids=["", "gradients"])
def test_two_lanes_on_a_gpu_have_the_bits_of_one(
    gradients: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs(8, 9000, 16, 64, 256, 2, dtype=torch.bfloat16, requires_grad=gradients)
    inputs = pytree.tree_map(lambda x: x.cuda() if torch.is_tensor(x) else x, inputs)
    found = []
    for turns in (1, 2, 2, 2):
        monkeypatch.setattr(operator, "TURNS", turns)
        o, state = neural_memory(**inputs, backend="triton", output_final_state=True)
        values = [o, *state.weights, *state.momentum]
        if gradients:
            values += torch.autograd.grad(o.float().sum(), pytree.tree_leaves(inputs))
        found.append([x.detach() for x in values])
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))
