"""Cases of the Triton kernels against the definition, each named by what it stresses."""

import random
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from unittest import mock

import torch
from inputs import make_inputs
from torch.utils import _pytree as pytree

import reference
from titans_kernels import MemoryState
from titans_kernels.kernels import operator
from titans_kernels.kernels.tiles import Tile

ACTIVATIONS = ("gelu_tanh", "gelu", "silu", "relu", "identity")


@dataclass(frozen=True)
class Case:
    edge: str  # what the row stresses
    T: int = 40
    chunk: int = 5
    depth: int = 2
    D: int = 16
    hidden: int = 32
    H: int = 1
    B: int = 1
    norm: bool = True
    residual: bool = True
    activation: str = "gelu_tanh"
    per_layer: bool = False  # gates
    read: str = "token"  # what queries read
    tile: tuple[int, ...] = (16, 16)  # block, slice, queries, rows
    group: int | None = None  # blocks of a sequence at a time; None: as many as fit into 2,048
    lengths: tuple[int, ...] | None = None  # of packed sequences, T in all
    past: tuple[int, ...] | None = None  # tokens that each sequence has behind it
    gates: dict = field(default_factory=dict)  # name: (value, share of tokens that have it)
    seed: int = 0

    def __str__(self):
        return self.edge


def forced(case):
    """Patch the operator: the case's tile, and so many blocks to a group."""
    tokens = operator.GROUP if case.group is None else case.group * case.tile[0]
    return mock.patch.multiple(operator, GROUP=tokens, tile=lambda *_: Tile(*case.tile))


def inputs_of(case):
    """Arguments of the operator in float64, an initial state among them."""
    sizes = {"H": case.H, "D": case.D, "hidden": case.hidden, "depth": case.depth}
    sizes |= {"norm": case.norm, "per_layer_gates": case.per_layer, "seed": case.seed}
    make = partial(make_inputs, requires_grad=False, **sizes)
    inputs = make(case.B, case.T, lengths=case.lengths)
    generator = torch.Generator().manual_seed(case.seed + 1)
    for name, (value, share) in case.gates.items():
        chosen = torch.rand(inputs[name].shape, generator=generator) < share
        inputs[name].masked_fill_(chosen, value)
    options = {"activation": case.activation, "residual": case.residual, "chunk_size": case.chunk}
    options |= {"read": case.read}
    if case.past is not None:
        behind = make(1, sum(case.past), lengths=case.past)
        _, state = reference.neural_memory(**behind, **options, output_final_state=True)
        options["initial_state"] = MemoryState(*state)
    return inputs | options


def leaves_of(case):
    """The same, every floating-point tensor a leaf of its own."""

    def leaf(x):
        floating = torch.is_tensor(x) and x.is_floating_point()
        return x.detach().clone().requires_grad_() if floating else x

    return pytree.tree_map(leaf, inputs_of(case))


# ------------------------------------------------------------------------------------- the tables


def _named(case, *parts):
    """A case with its options in its name."""
    parts += (f"depth {case.depth}", "tile {}".format("x".join(map(str, case.tile))))
    parts += (case.activation,) if case.depth == 2 else ()
    parts += tuple(x for x in ("norm", "residual", "per_layer") if getattr(case, x))
    parts += () if case.past is None else ("past {}".format("+".join(map(str, case.past))),)
    parts += () if case.group is None else (f"{case.group} to a group",)
    return replace(case, edge=" ".join(parts))


def _sizes():
    """Every length with every chunk and depth; the other settings take turns."""
    turn = random.Random(0)
    for T, chunk, depth in product(
        (1, 15, 16, 17, 33, 50, 70), (1, 3, 5, 8, 16, 20, 40, 100), "12"
    ):
        if chunk == 1 and T > 20:
            continue
        behind = turn.choice((None, None, turn.randrange(2 * min(chunk, 20) + 1)))
        case = Case(
            "",
            T,
            chunk,
            int(depth),
            D=turn.choice((16, 16, 32, 48)),
            hidden=turn.choice((16, 32, 48)),
            H=turn.choice((1, 2)) if T <= 17 else 1,
            norm=turn.random() < 0.6,
            residual=turn.random() < 0.6,
            activation=turn.choice(ACTIVATIONS),
            per_layer=turn.random() < 0.5,
            tile=turn.choice(
                ((16, 16), (16, 32), (32, 16), (32, 32), (32, 16, 16), (16, 16, 16, 16))
            ),
            group=turn.choice((None, 1, 2)),
            past=None if behind is None else (behind,),
            seed=turn.randrange(1000),
        )
        yield _named(case, f"T {T}", f"chunk {chunk}")


def _networks():
    """Every network with every kind of gates."""
    flags = list(product((False, True), repeat=3))
    for depth, activation in ((1, "gelu_tanh"), *((2, x) for x in ACTIVATIONS)):
        for norm, residual, per_layer in flags:
            case = Case("", 20, 5, depth, norm=norm, residual=residual, per_layer=per_layer)
            yield _named(replace(case, activation=activation), "network")


def _shapes():
    """Head dimensions and hidden widths that fill their tiles, and that do not."""
    for D, hidden in product((16, 32, 48, 96), (16, 48, 64, 128)):
        tile = (16, 32) if (D + hidden) % 32 else (32, 64)
        yield Case(
            f"D {D} hidden {hidden} tile {tile[0]}x{tile[1]}", 20, D=D, hidden=hidden, tile=tile
        )
    for D in (32, 48, 96):
        yield Case(f"D {D} linear", 20, depth=1, D=D, per_layer=True)
    for D, depth in product((144, 256), (1, 2)):
        yield Case(f"D {D} depth {depth}", 20, 16, depth, D=D, group=1)
    yield Case("two rows of three heads", 20, B=2, H=3)
    yield Case("two rows of three heads, linear", 20, depth=1, B=2, H=3)
    yield Case("tile 64x64, whole chunks", 70, 16, hidden=64, tile=(64, 64))
    yield Case("tile 64x64, ragged chunks", 70, 20, hidden=64, tile=(64, 64), per_layer=True)
    yield Case("tile 64x64, chunk over blocks", 150, 100, hidden=64, tile=(64, 64), norm=False)
    yield Case("tile 64x64, one chunk a block", 150, 64, hidden=64, tile=(64, 64), past=(50,))
    yield Case("tile 32x32, chunk of 64", 150, 64, per_layer=True, tile=(32, 32), past=(50,))
    yield Case("tile 64x64, linear", 70, 16, depth=1, D=64, tile=(64, 64))
    yield Case("tile 64x64, packed", 80, 16, lengths=(65, 0, 15), tile=(64, 64), past=(3, 20, 40))
    yield Case("tile 64x64x32", 70, 16, hidden=96, tile=(64, 64, 32), H=2)
    yield Case(
        "tile 64x32x32, packed", 80, 20, lengths=(33, 0, 47), tile=(64, 32, 32), past=(0, 9, 40)
    )
    yield Case("tile 64x32x16, linear", 70, 5, depth=1, D=48, tile=(64, 32, 16), past=(33,))
    yield Case("tile 32x32x32x16", 70, 16, D=48, hidden=64, tile=(32, 32, 32, 16), past=(5,))
    yield Case("tile 16x64", 33, 16, hidden=128, tile=(16, 64))
    yield Case("tile 64x16", 70, 16, hidden=48, tile=(64, 16))
    yield Case("tile 128x16", 150, 16, depth=1, tile=(128, 16))
    yield Case("tile 128x64", 150, 16, D=48, hidden=64, tile=(128, 64, 32), past=(9,))


def _depths():
    """Three and four layers: the loops over layers, the widths between two hidden ones."""
    for depth, (chunk, group) in product((3, 4), ((4, None), (5, 1), (20, None))):
        case = Case("", 20, chunk, depth, group=group, past=(7,), per_layer=chunk == 5)
        yield _named(case, f"layers, chunk {chunk}")
    packed = Case("", 40, 5, 3, hidden=48, H=2, lengths=(17, 0, 23), past=(3, 9, 0), norm=False)
    yield _named(replace(packed, tile=(32, 16, 16), residual=False), "layers, packed")
    yield _named(Case("", 33, 16, 4, D=48, hidden=64, tile=(32, 32, 16, 16)), "layers, D 48")
    yield _named(Case("", 20, 5, 3, activation="silu", gates={"alpha": (1.0, 0.3)}), "layers")


def _starts():
    """Queries that read what their chunk starts with: chunks in a block, and over several."""
    turn = random.Random(1)
    for chunk, depth, group in product((1, 5, 16, 20, 40), (1, 2), (None, 1)):
        T, past = (20, None) if chunk == 1 else (50, turn.choice((None, (chunk // 2 + 3,))))
        case = Case("", T, chunk, depth, group=group, past=past, per_layer=turn.random() < 0.5)
        case = replace(case, read="chunk", norm=turn.random() < 0.5, residual=turn.random() < 0.5)
        yield _named(case, f"starts, chunk {chunk}")
    packed = Case("", 60, 20, lengths=(33, 0, 27), past=(0, 9, 25), read="chunk", H=2, group=1)
    yield from (_named(replace(packed, chunk=n), f"starts, packed, chunk {n}") for n in (5, 40))
    yield _named(Case("", 40, 5, 3, read="chunk", past=(7,)), "starts, layers")
    yield _named(Case("", 40, 20, 4, read="chunk", past=(7,), per_layer=True), "starts, layers")
    tile = (64, 32, 32, 16)
    yield _named(Case("", 80, 16, D=48, read="chunk", past=(9,), tile=tile), "starts, D 48")


def _gates():
    """Gates at their bounds, in blocks of several chunks and in chunks of several blocks."""
    bounds = {
        "alpha 1 at some": {"alpha": (1.0, 0.3)},
        "alpha 1 at all": {"alpha": (1.0, 1.0)},
        "alpha 0 at all": {"alpha": (0.0, 1.0)},
        "eta 0 at some": {"eta": (0.0, 0.3)},
        "eta 0 at all": {"eta": (0.0, 1.0)},
        "theta 0 at some": {"theta": (0.0, 0.3)},
        "theta 0 at all": {"theta": (0.0, 1.0)},
        "all at bounds": {"alpha": (1.0, 0.3), "eta": (0.0, 0.3), "theta": (0.0, 0.3)},
        "nothing happens": {"alpha": (0.0, 1.0), "eta": (0.0, 1.0), "theta": (0.0, 1.0)},
    }
    for (edge, gates), chunk, depth in product(bounds.items(), (5, 40), (1, 2)):
        case = Case("", chunk=chunk, depth=depth, gates=gates, per_layer=depth == 2, past=(7,))
        yield _named(case, f"{edge}, chunk {chunk}")
    eta = Case("eta 1 at some, theta 0 there", 20, gates={"eta": (1.0, 0.3), "theta": (0.0, 0.3)})
    yield from (eta, replace(eta, edge=f"{eta.edge}, linear", depth=1))


def _groups():
    """Sequences over several groups of blocks; the state and an open chunk go across."""
    for chunk, group, depth in product((5, 16, 20, 40, 100), (1, 2, 3), (1, 2)):
        past = None if group == 2 else (chunk + 3,)
        yield _named(Case("", 70, chunk, depth, group=group, past=past), f"groups, chunk {chunk}")
    packed = Case("", 90, 40, lengths=(50, 0, 40), past=(0, 39, 41))
    yield from (_named(replace(packed, group=n), "groups, packed") for n in (1, 2, 3))


def _states():
    """Sequences that go on, rows at phases of their own, and packed ones."""
    dense = {"one token short": (4, 9, 0), "whole": (5, 0, 10), "each its own": (1, 7, 13)}
    for (edge, past), T, depth in product(dense.items(), (0, 1, 4, 17), (1, 2)):
        case = Case("", T, depth=depth, B=3, past=past, per_layer=depth == 1)
        yield _named(case, f"{edge} before {T} tokens")
    packed = {
        "mixed": (17, 0, 1, 22),
        "all empty but one": (0, 21, 0),
        "one": (20,),
        "single tokens": (1, 1, 1),
        "empty at the ends": (0, 0, 16, 16, 0),
    }
    for (edge, lengths), (chunk, depth), goes_on in product(
        packed.items(), ((5, 2), (16, 1), (20, 2)), (False, True)
    ):
        past = tuple(3 + 9 * n % 23 for n in range(len(lengths))) if goes_on else None
        case = Case("", sum(lengths), chunk, depth, lengths=lengths, past=past, seed=3)
        yield _named(case, f"packed, {edge}, chunk {chunk}")
    for chunk, depth in ((16, 1), (16, 2), (100, 2)):
        yield _named(Case("", 0, chunk, depth), f"no token, chunk {chunk}")
    yield Case("packed, no token", 0, lengths=(0, 0))
    yield Case("chunk that no sequence reaches", chunk=2**16, group=2)


CASES = [
    *_sizes(),
    *_networks(),
    *_shapes(),
    *_depths(),
    *_starts(),
    *_gates(),
    *_groups(),
    *_states(),
]
