"""Check, then time: every provider of a case in one run, taking turns.

PyTorch's own timer does the timing (`torch.utils.benchmark`): warm, garbage collection off. A round
measures each provider once, and a ratio is the median over rounds of one round's quotient, so that
a machine that slows down does so for both. Gradients are returned, not accumulated: none pile up.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch.utils.benchmark import Measurement, Timer

from .cases import OURS, Case
from .journal import in_short
from .machine import Machine
from .memory import peak_growth
from .providers import Task, runner
from .shapes import BOTH, FORWARD, Shape

RESOLUTION = 2**20  # bytes; a peak below that is not compared with another


@dataclass(frozen=True)
class Effort:
    """How long to measure: `rounds`, fewer (at least 3) once a provider has had `seconds`."""

    rounds: int = 9
    seconds: float = 60.0
    round_seconds: float = 0.5
    threads: int = 1
    memory: bool = True


QUICK = Effort(rounds=2, seconds=1.0, round_seconds=0.002)


@dataclass(frozen=True)
class Row:
    """One provider in one mode at one shape. Ratios: how many times ours' time, ours' memory."""

    case: str
    shape: Shape
    mode: str
    provider: str
    problem: str | None = None  # why there is nothing else
    error: float | None = None  # of ours, relative to the definition
    median_s: float | None = None
    p20_s: float | None = None
    p80_s: float | None = None
    calls: int | None = None
    tokens_per_s: float | None = None
    flop: int | None = None
    of_ceiling: float | None = None  # of the matrix product's FLOP per second
    least_bytes: int | None = None
    of_copy: float | None = None  # of the copy's bytes per second
    peak_bytes: int | None = None
    time_ratio: float | None = None
    memory_ratio: float | None = None
    dtype: str = "float32"

    def record(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Row:
        return cls(**{**record, "shape": Shape(**record["shape"])})


FIELDS = tuple(field.name for field in fields(Row))


def deviation(case: Case, shape: Shape, mode: str) -> float:
    """Largest relative error of ours on a prefix of the inputs; NaN counts as infinite.

    Outputs and gradients of the prefix, and the prefix of what the timed call returns.
    """
    definition = case.definition(case.exact(shape, shape.checked), shape)
    ours = case.providers[OURS](case.made(shape, shape.checked), shape)
    expected, actual = ([runner(task, FORWARD)()] for task in (definition, ours))
    if case.per_token:
        whole = case.providers[OURS](case.made(shape, shape.T), shape)
        expected.append(expected[0])
        actual.append(runner(whole, FORWARD)()[:, : shape.checked])
    if mode == BOTH:
        expected += runner(definition, BOTH)()
        actual += runner(ours, BOTH)()
    errors = []
    for a, e in zip(actual, expected, strict=True):
        if a is None or a.shape != e.shape:
            return float("inf")
        errors.append(float((a.cpu().double() - e).norm() / e.norm()))
    return max(error if error == error else float("inf") for error in errors)


def least_bytes(task: Task, case: Case, shape: Shape, mode: str) -> int | None:
    """Inputs, parameters and output, and with backward their gradients, each moved once."""
    if not task.leaves:
        return None
    output = shape.B * shape.T * shape.dim * case.dtype.itemsize
    return (2 if mode == BOTH else 1) * (output + sum(leaf.nbytes for leaf in task.leaves))


def measure(case: Case, shape: Shape, mode: str, machine: Machine, effort: Effort) -> Iterator[Row]:
    """The rows of a case at one shape, ours first; none but a refusal if ours is wrong.

    `machine`: whose ceilings rows are compared with.
    """
    error = deviation(case, shape, mode)
    dtype = str(case.dtype).removeprefix("torch.")
    if not error <= case.bound:
        problem = f"wrong: relative error {error:.1e}, bound {case.bound:.0e}; not timed"
        yield Row(case.name, shape, mode, OURS, problem, error, dtype=dtype)
        return

    runners, problems, least = {}, {}, {}
    for name, build in case.providers.items():
        try:
            task = build(case.made(shape, shape.T), shape)
            runners[name], least[name] = runner(task, mode), least_bytes(task, case, shape, mode)
            if case.device != "cpu" and name != OURS:
                runners[name]()  # a peer may not do the case
        except ImportError as missing:
            problems[name] = f"not measured: {missing}"
        except Exception as failure:
            if name == OURS:
                raise
            problems[name] = f"not measured: {in_short(failure)}"
    for name in problems:
        runners.pop(name, None)

    rounds = take_turns(runners, effort)
    peaks = {
        name: peak_growth(case, name, shape, mode, effort.threads) if effort.memory else None
        for name in runners
    }
    for name in case.providers:
        if name in problems:
            yield Row(case.name, shape, mode, name, problems[name], dtype=dtype)
            continue
        times = [seconds for turn in rounds for seconds in turn[name].times]
        p20, median, p80 = quantiles(times)
        flop = case.flop[name](shape, mode) if name in case.flop else None
        mine, theirs = peaks[OURS], peaks[name]
        yield Row(
            case.name,
            shape,
            mode,
            name,
            error=error if name == OURS else None,
            median_s=median,
            p20_s=p20,
            p80_s=p80,
            calls=sum(len(turn[name].times) * turn[name].number_per_run for turn in rounds),
            tokens_per_s=shape.B * (shape.T if case.per_token else 1) / median,
            flop=flop,
            of_ceiling=_share(flop, median, machine.matmul_flops),
            least_bytes=least[name],
            of_copy=_share(least[name], median, machine.copy_bytes),
            peak_bytes=theirs,
            time_ratio=statistics.median(t[name].median / t[OURS].median for t in rounds),
            memory_ratio=memory_ratio(theirs, mine),
            dtype=dtype,
        )


def _share(amount: float | None, seconds: float, ceiling: float | None) -> float | None:
    return amount / seconds / ceiling if amount is not None and ceiling else None


def take_turns(
    runners: dict[str, Callable[[], Any]], effort: Effort
) -> list[dict[str, Measurement]]:
    """Rounds of measurements, one of each provider in each."""
    timers = {
        name: Timer("run()", globals={"run": run}, num_threads=effort.threads)
        for name, run in runners.items()
    }
    rounds: list[dict[str, Measurement]] = []
    spent = dict.fromkeys(timers, 0.0)
    while len(rounds) < effort.rounds:
        turn = {
            name: timer.blocked_autorange(min_run_time=effort.round_seconds)
            for name, timer in timers.items()
        }
        rounds.append(turn)
        for name, m in turn.items():
            spent[name] += sum(m.raw_times)
        if len(rounds) >= 3 and max(spent.values()) > effort.seconds:
            break
    return rounds


def memory_ratio(theirs: int | None, ours: int | None) -> float | None:
    """None where one was not measured, or is too small to be."""
    if theirs is None or ours is None or min(theirs, ours) < RESOLUTION:
        return None
    return theirs / ours


def quantiles(times: list[float]) -> tuple[float, float, float]:
    """20th percentile, median, 80th."""
    probabilities = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    low, middle, high = torch.tensor(times, dtype=torch.float64).quantile(probabilities).tolist()
    return low, middle, high
