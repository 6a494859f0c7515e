"""The first minute on a GPU: are the kernels right there, and how long does each of them take?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch

from titans_kernels.kernels import operator
from titans_kernels.kernels.tiles import Tile, architecture, tile, using
from titans_kernels.verify import environment

from ..machine_code import tune
from ..running import kernels
from ..running.checking import Setting, bound, decode_error, error, results
from ..running.journal import Row
from ..running.shapes import Shape
from .kit import Kit, Step, Steps

HEADS = 4  # of a sequence: kernels are compiled for it, and so once for all sequences
SEQUENCES = (4, 32, 99)  # times HEADS: 16, 128 and 396 programs of scan, three to a multiprocessor


def first(kit: Kit) -> Steps:
    """Outputs, gradients and decoding on poisoned memory; then the time of every kernel."""
    yield Step("environment", lambda: {"tail": environment(kit.device)}, 2)
    both = [_setting(kit, backward=backward) for backward in (False, True)]
    jobs = [(setting, choice) for setting in both for choice in candidates(kit, setting)]
    jobs = jobs[:1] if kit.rehearse else jobs
    yield Step("compile", partial(tune.compile_all, jobs), 5 if kit.rehearse else 20)
    for setting in both:
        name = "gradients" if setting.backward else "outputs"
        yield Step(name, partial(check, setting), 5)
    yield Step("decoding", partial(_decoding, both[0]), 5)
    for sequences in (1,) if kit.rehearse else SEQUENCES:
        long = replace(both[0].shape, B=sequences, T=4 * both[0].shape.T)
        name = f"{sequences * both[0].shape.H} heads, two lanes"
        yield Step(name, partial(_lanes, replace(both[0], shape=long)), 5)
    for setting in both:
        for choice in candidates(kit, setting):
            for sequences in (1,) if kit.rehearse else SEQUENCES:
                sized = replace(setting, shape=replace(setting.shape, B=sequences))
                yield Step(_name(sized, choice), partial(_times, sized, choice), 5)


def _setting(kit: Kit, backward: bool) -> Setting:
    shape = Shape(16, 16, 1, 1, 16, 2) if kit.rehearse else Shape(2048, 16, 1, HEADS, 64)
    return Setting(shape, kit.dtype, kit.device, backward=backward)


def candidates(kit: Kit, setting: Setting) -> list[Tile]:
    """The tile that ships, then its blocks and the warps that hold them."""
    if kit.rehearse:
        return [Tile(16, 16), Tile(32, 16)][: 1 if setting.backward else 2]
    return list(dict.fromkeys(_candidates(setting)))


def _candidates(setting: Setting) -> Iterator[Tile]:
    s, arch = setting.shape, architecture(torch.device(setting.device))
    shipped = tile(s.D, s.hidden, getattr(torch, setting.dtype), arch, s.chunk, setting.backward)
    yield shipped
    for change in (tune.TRAINING if setting.backward else tune.FORWARD)[0]:
        yield replace(shipped, **change)


def check(setting: Setting, choice: Tile | None = None) -> Row:
    """The relative error of the kernels, and whether it is within its bound."""
    return judged(error(setting, choice), bound(setting))


def judged(found: float, most: float) -> Row:
    row: Row = {"error": found, "bound": most}
    return row if found <= most else row | {"problem": "wrong"}


def _decoding(setting: Setting) -> Row:
    return judged(decode_error(setting), bound(setting))


def _lanes(setting: Setting) -> Row:
    """A call whose groups are read while others learn, beside one that takes turns; bit for bit."""
    inputs, ms, found = setting.inputs(), {}, {}
    for turns in (1, operator.TURNS):
        with mock.patch.object(operator, "TURNS", turns):
            ms[turns] = tune.milliseconds(setting, inputs)
            found[turns] = results(setting, inputs, "triton")
    one, two = found.values()
    same = all(torch.equal(x, y) for x, y in zip(one, two, strict=True))
    row: Row = {"ms": ms[operator.TURNS], "one_lane_ms": ms[1]}
    return row if same else row | {"problem": "wrong: other bits than on one lane"}


def _name(setting: Setting, choice: Tile) -> str:
    s, training = setting.shape, ", gradients" if setting.backward else ""
    return f"{s.B * s.H} heads{training}, {tune.written(choice)}"


def _times(setting: Setting, choice: Tile) -> Row:
    found: dict[str, Any] = check(tune.fewer(setting), choice)
    if "problem" in found:
        return found
    inputs = setting.inputs()
    with using(choice):
        ms = kernels.milliseconds(
            lambda: results(setting, inputs, "triton"),
            setting.device,
            repeats=1 if setting.device == "cpu" else 5,
        )
    return found | {"ms": sum(ms.values()), "by_kernel": ms}
