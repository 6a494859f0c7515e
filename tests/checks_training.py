"""Checks of the training program on meshes of processes, which `test_distributed` runs."""

import csv
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from titans_kernels.models import TitansForCausalLM
from titans_kernels.train.config import MESH, Config
from titans_kernels.train.loop import Training
from titans_kernels.train.processes import Processes

ALONE = Processes(0, 1, torch.device("cpu"))
RUN = {
    **{"steps": 20, "rows": 2, "length": 18, "pieces": 4, "warmup": 4, "learning_rate": 0.01},
    **{"log_every": 1, "checkpoint_every": 20, "evaluate_every": 20, "evaluate_files": 2},
    **{"evaluate_length": 40, "pattern": "*.txt"},
}
MODEL = {
    **{"hidden_size": 16, "num_hidden_layers": 1, "num_heads": 2, "window": 7, "segment": 7},
    **{"chunk_size": 4, "variant": "mag"},
}


def _config(folder, name, **changes):
    text = Path(folder, "text")
    return Config(
        **(RUN | {"out": f"{folder}/{name}", "data": str(text), "model": MODEL} | changes)
    )


def _write_text(rank, folder):
    """Sixteen files of words in another order each."""
    if rank == 0 and not Path(folder, "text").exists():
        Path(folder, "text").mkdir()
        words = [b"memory ", b"of ", b"what ", b"surprises ", b"a ", b"reader, ", b"forgets\n"]
        for i in range(16):
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


def _same_run(got, want):
    """float32, over 20 steps in which the loss falls."""
    for log, names in (("train.csv", ("bits", "gradient")), ("evaluation.csv", ("bits",))):
        pairs = list(zip(_rows(got, log), _rows(want, log), strict=True))
        for one, other in pairs:
            assert one["step"] == other["step"]
            for name in names:
                assert float(one[name]) == pytest.approx(float(other[name]), rel=1e-5, abs=1e-5)
    losses = [float(row["bits"]) for row in _rows(want, "train.csv")]
    assert len(losses) == 20 and losses[-1] < losses[0] - 1


def _alone(rank, folder, name, **changes):
    config = _config(folder, f"alone-{name}", **changes)
    if rank == 0 and not Path(config.out).exists():
        Training(config, ALONE).run()
    dist.barrier()
    return config


def _on_meshes(rank, folder, meshes, **changes):
    _write_text(rank, folder)
    name = "-".join(map(str, changes.values()))
    want = _alone(rank, folder, name, **changes)
    for sizes in meshes:
        config = _config(folder, "x".join(map(str, sizes)) + name, **changes)
        Training(config, _processes(*sizes)).run()
        dist.barrier()
        if rank == 0:
            _same_run(config, want)
    if rank == 0:
        models = (TitansForCausalLM.from_pretrained(f"{c.out}/model") for c in (config, want))
        for got, expected in zip(*(model.parameters() for model in models), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def check_a_run_on_any_mesh(rank, folder):
    _on_meshes(rank, folder, [(2, 1, 1), (1, 2, 1), (1, 1, 2)])


def check_a_run_on_any_mesh_of_four(rank, folder):
    _on_meshes(rank, folder, [(2, 2, 1), (1, 2, 2)])


def check_checkpointing_and_other_blocks(rank, folder):
    model = MODEL | {"variant": "mac", "loss_chunk": 10}
    _on_meshes(rank, folder, [(1, 2, 1)], gradient_checkpointing=True, model=model)


def check_a_run_goes_from_mesh_to_mesh(rank, folder):
    """In the middle of a window of text: memories go with it. The second half is written in the
    background."""
    _write_text(rank, folder)
    want = _alone(rank, folder, "")
    for until, sizes in ((5, (2, 1, 1)), (10, (1, 2, 1)), (15, (1, 1, 2))):
        config = _config(folder, "moved", checkpoint_every=5, asynchronous=until > 5)
        training = Training(config, _processes(*sizes))
        assert training.step == until - 5
        training.run(until)
        dist.barrier()
    if rank == 0:
        config = _config(folder, "moved", checkpoint_every=5)
        Training(config, ALONE).run()
        _same_run(config, want)


TWO = [check_a_run_goes_from_mesh_to_mesh]
WIDE = [check_a_run_on_any_mesh, check_checkpointing_and_other_blocks]
WIDE_FOUR = [check_a_run_on_any_mesh_of_four]
