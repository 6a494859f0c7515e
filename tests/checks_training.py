"""Checks of the training program on meshes of processes, which `test_distributed` runs."""

import csv
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from distributed_cases import raises
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh

from titans_kernels.train.config import MESH, Config
from titans_kernels.train.loop import Training
from titans_kernels.train.processes import Processes

ALONE = Processes(0, 1, torch.device("cpu"))
RUN = {
    **{"steps": 20, "rows": 4, "length": 18, "pieces": 4, "warmup": 4, "learning_rate": 0.005},
    **{"log_every": 1, "checkpoint_every": 20, "evaluate_every": 20, "evaluate_files": 4},
    **{"evaluate_length": 40, "pattern": "*.txt"},
}
MODEL = {
    **{"hidden_size": 16, "num_hidden_layers": 1, "num_heads": 4, "window": 7, "segment": 7},
    **{"chunk_size": 4, "variant": "mag"},
}


def _config(folder, name, **changes):
    text = Path(folder, "text")
    return Config(
        **(RUN | {"out": f"{folder}/{name}", "data": str(text), "model": MODEL} | changes)
    )


def _write_text(rank, folder):
    """Files of words in another order each, of which four are held out."""
    if rank == 0 and not Path(folder, "text").exists():
        Path(folder, "text").mkdir()
        words = [b"memory ", b"of ", b"what ", b"surprises ", b"a ", b"reader, ", b"forgets\n"]
        for i in range(32):
            order = torch.randint(7, (1000,), generator=torch.Generator().manual_seed(i))
            Path(folder, f"text/{i}.txt").write_bytes(b"".join(words[j] for j in order))
    dist.barrier()


def _processes(*sizes):
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=MESH)
    rank, count, cpu = dist.get_rank(), dist.get_world_size(), torch.device("cpu")
    return Processes(rank, count, cpu, mesh, dist.new_group(backend="gloo"))


def _rows(config, log):
    with Path(config.out, log).open(newline="") as file:
        return list(csv.DictReader(file))


def _same_run(got, want, bound=1e-5):
    """Over 20 steps in which the loss falls, by default in float32.

    Losses are within `bound` bits. The gradient's norm is within `bound` of itself in the root mean
    square over the steps, and within ten times that in each: of some batches it is that sensitive.
    """
    for log in ("train.csv", "evaluation.csv"):
        for one, other in zip(_rows(got, log), _rows(want, log), strict=True):
            assert one["step"] == other["step"]
            assert abs(float(one["bits"]) - float(other["bits"])) <= bound, one
    losses, norms, found = (
        torch.tensor([float(row[name]) for row in _rows(run, "train.csv")], dtype=torch.float64)
        for run, name in ((want, "bits"), (want, "gradient"), (got, "gradient"))
    )
    apart = found / norms - 1
    assert apart.abs().max() <= 10 * bound and apart.square().mean().sqrt() <= bound, apart
    assert len(losses) == 20 and losses[-1] < losses[0] - 1


def _alone(rank, folder, name, **changes):
    config = _config(folder, f"alone-{name}", **changes)
    if rank == 0 and not Path(config.out).exists():
        Training(config, ALONE).run()
    dist.barrier()
    return config


def _on_meshes(rank, folder, meshes, name="", bound=1e-5, **changes):
    """Activation checkpointing changes nothing, so some have it."""
    _write_text(rank, folder)
    want = _alone(rank, folder, name, **changes)
    for sizes in meshes:
        out = "x".join(map(str, sizes)) + name
        config = _config(folder, out, gradient_checkpointing=sizes[1] > 1, **changes)
        Training(config, _processes(*sizes)).run()
        dist.barrier()
        if rank == 0:
            _same_run(config, want, bound)
            got, expected = (load_file(f"{c.out}/model/model.safetensors") for c in (config, want))
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def check_runs_in_each_direction(rank, folder):
    """All processes divide the rows, or the length, or the heads."""
    count = dist.get_world_size()
    _on_meshes(rank, folder, [(count, 1, 1), (1, count, 1), (1, 1, count)])


def check_runs_in_two_directions(rank, folder):
    _on_meshes(rank, folder, [(2, 2, 1), (1, 2, 2)])


def check_other_blocks(rank, folder):
    """In float64: this run multiplies a rounding by more than a thousand."""
    model = MODEL | {"variant": "mac", "loss_chunk": 10}
    torch.set_default_dtype(torch.float64)
    try:
        _on_meshes(rank, folder, [(1, 2, 1)], "mac", 1e-10, model=model)
    finally:
        torch.set_default_dtype(torch.float32)


def check_a_run_goes_from_mesh_to_mesh(rank, folder):
    """From one process to four and back, in the middle of a window of text: memories go with it.
    The checkpoint of the last mesh is written in the background."""
    _write_text(rank, folder)
    want = _alone(rank, folder, "")
    if rank == 0:
        Training(_config(folder, "moved", checkpoint_every=5), ALONE).run(5)
    for until, sizes in ((10, (2, 2, 1)), (15, (1, 2, 2))):
        config = _config(folder, "moved", checkpoint_every=5, asynchronous=until > 10)
        training = Training(config, _processes(*sizes))
        assert training.step == until - 5
        training.run(until)
        dist.barrier()
    if rank == 0:
        config = _config(folder, "moved", checkpoint_every=5)
        Training(config, ALONE).run()
        _same_run(config, want)


def check_what_processes_are_given(rank, folder):
    """Options and text are the same everywhere, or it is told."""
    _write_text(rank, folder)
    processes = _processes(dist.get_world_size(), 1, 1)
    for changes, words in (
        ({"seed": rank}, "seed: got 1 on rank 1, takes 0, as on rank 0"),
        ({"model": MODEL | {"chunk_size": 4 + rank}}, "model.chunk_size: got 5 on rank 1, takes 4"),
        (
            {"model": MODEL | {"expansion": 2} if rank else MODEL},
            "model.expansion: got 2 on rank 1",
        ),
    ):
        config = _config(folder, "unlike", **changes)
        raises(ValueError, words, lambda config=config: Training(config, processes))
    config = _config(folder, "unlike")
    with mock.patch.object(Training, "_text_checksum", lambda _: rank):
        raises(ValueError, "data, its checksum: got 1", lambda: Training(config, processes))
    raises(ValueError, "mesh: got", lambda: processes.agree({"mesh": [1 + rank]}))


TWO = [check_what_processes_are_given, check_runs_in_each_direction, check_other_blocks]
FOUR = [check_runs_in_each_direction, check_a_run_goes_from_mesh_to_mesh]
WIDE_FOUR = [check_runs_in_two_directions]
