"""The training loop: ordinary PyTorch, with the memory carried from step to step."""

from __future__ import annotations

import csv
import json
import math
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..demo.plot import by_doubling
from ..demo.text import excerpts, read_text, windows
from ..demo.training import bits
from ..models import TitansCache, TitansConfig, TitansForCausalLM
from . import checkpoint
from .config import Config
from .processes import Processes


class Training:
    """A run: `run()` takes it to its last step, from wherever it is."""

    def __init__(self, config: Config, processes: Processes) -> None:
        self.config, self.processes = config, processes
        self.out, self.step = Path(config.out), 0
        torch.manual_seed(config.seed)
        self._read_text()
        self.model = TitansForCausalLM(TitansConfig(**config.model_options()))
        self.model.to(processes.device).train()
        if config.gradient_checkpointing:
            self.model.activation_checkpointing_enable()
        self.parallel: nn.Module = self.model
        if processes.count > 1:
            # After the first piece M_0 and the persistent tokens have no part in the loss.
            self.parallel = DistributedDataParallel(
                self.model, find_unused_parameters=config.pieces > 1
            )
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, config.weight_decay), betas=(0.9, 0.95)
        )
        self.cache = TitansCache(len(self.model.model.layers))
        self._resume()

    def _read_text(self) -> None:
        """The files that are long enough."""
        config, text = self.config, read_text(self.config.data, self.config.pattern)
        least = config.pieces * config.length + 1, config.evaluate_length + 1
        self.files = [file for file in text.train if len(file) >= least[0]]
        self.held_out = [file for file in text.held_out if len(file) >= least[1]]
        if not self.files:
            raise ValueError(f"pieces, length: no file is {least[0]} bytes long")
        if min(len(self.held_out), config.evaluate_files) < self.processes.count:
            raise ValueError(
                f"evaluate_files, evaluate_length: {len(self.held_out)} files held out are "
                f"{least[1]} bytes long, takes one for each process at least"
            )

    def run(self, until: int | None = None) -> None:
        """Train to the last step, or to an earlier one."""
        from tqdm import tqdm

        config, end = self.config, min(until or self.config.steps, self.config.steps)
        bar = tqdm(
            total=config.steps,
            initial=self.step,
            desc="training",
            unit="step",
            mininterval=0.5,
            disable=not self.processes.first,
        )
        with bar:
            while self.step < end:
                row = self._train_step()
                bar.update()
                last = self.step == config.steps
                if self.step % config.log_every == 0 or last:
                    row = {n: x.item() if isinstance(x, Tensor) else x for n, x in row.items()}
                    bar.set_postfix_str(f"{row['bits']:.3f} bits per byte", refresh=False)
                    self._log("train.csv", [row])
                if self.step % config.evaluate_every == 0 or last:
                    self._log("evaluation.csv", self.evaluate())
                if self.step % config.checkpoint_every == 0 or last:
                    self._save()
        if self.step == config.steps and self.processes.first:
            self.model.save_pretrained(self.out / "model")
        self.processes.wait()

    def _train_step(self) -> dict[str, Any]:
        """One piece of text of every row, one step of the optimizer."""
        config = self.config
        window, piece = divmod(self.step, config.pieces)
        if piece == 0:
            self.cache.reset()
        start = piece * config.length
        text = self._window(window)[:, start : start + config.length + 1]
        rate = self._rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with self._precision():
            out = self.parallel(text[:, :-1], past_key_values=self.cache, use_cache=True)
        loss = bits(out.logits.float(), text[:, 1:]).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimizer.step()
        self.cache.detach()
        self.step += 1
        mean = self.processes.sum(loss.detach()) / self.processes.count
        return {"step": self.step, "bits": mean, "learning_rate": rate, "gradient": norm}

    @torch.no_grad()
    def evaluate(self) -> list[dict[str, float]]:
        """Bits per byte of held-out text, by how much of it has been read."""
        config, processes = self.config, self.processes
        mine = slice(processes.rank, None, processes.count)
        longest, files = config.evaluate_length + 1, config.evaluate_files
        text = excerpts(self.held_out, longest, files)[mine].to(processes.device)
        self.model.eval()
        parts = (t.split(config.length, 1) for t in (text[:, :-1], text[:, 1:]))
        cache, costs = TitansCache(len(self.cache)), []
        for now, after in zip(*parts, strict=True):
            with self._precision():
                logits = self.model(now, past_key_values=cache, use_cache=True).logits
            costs.append(bits(logits.float(), after))
        self.model.train()
        ends, means = by_doubling(torch.cat(costs, 1), config.length)
        rows = torch.tensor(float(len(text)), device=processes.device)
        means = processes.sum(means.sum(0)) / processes.sum(rows)
        starts = [0, *ends.tolist()]
        return [
            {"step": self.step, "from": a, "to": b, "bits": float(mean)}
            for a, b, mean in zip(starts, ends.tolist(), means, strict=False)
        ]

    def _window(self, index: int) -> Tensor:
        """Text of `pieces` steps, [rows, pieces length + 1]: a function of its index and the seed.

        So a run that goes on reads what it would have read.
        """
        config, processes = self.config, self.processes
        seed = (config.seed * 1_000_003 + index) * processes.count + processes.rank
        generator = torch.Generator().manual_seed(seed)
        length = config.pieces * config.length + 1
        return windows(self.files, length, config.rows, generator).to(processes.device)

    def _rate(self, step: int) -> float:
        config = self.config
        cosine = 0.5 * (1 + math.cos(math.pi * step / config.steps))
        return config.learning_rate * min(1, (step + 1) / config.warmup) * (0.1 + 0.9 * cosine)

    def _precision(self) -> Any:
        kind = self.processes.device.type
        bf16 = self.config.bf16 and kind == "cuda"
        return torch.autocast(kind, torch.bfloat16) if bf16 else nullcontext()

    def _save(self) -> None:
        shared = {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        own = [layer.state for layer in self.cache.layers]  # the memories, which are ours alone
        keep = self.config.keep
        checkpoint.save(self.out / "checkpoints", self.step, shared, own, self.processes, keep)

    def _resume(self) -> None:
        """Go on from the newest checkpoint in the folder, or begin there."""
        written = self.out / "config.json"
        found = checkpoint.newest(self.out / "checkpoints")
        if found:
            before = json.loads(written.read_text())
            now = asdict(self.config)
            if changed := [name for name in now if now[name] != before.get(name)]:
                raise ValueError(f"{written}: the run there has other {', '.join(changed)}")
            shared, own = checkpoint.load(found, self.processes)
            self.step = shared["step"]
            self.model.load_state_dict(shared["model"])
            self.optimizer.load_state_dict(shared["optimizer"])
            for layer, state in zip(self.cache.layers, own, strict=True):
                layer.store(state, self.step % self.config.pieces * self.config.length)
        if self.processes.first:
            self.out.mkdir(parents=True, exist_ok=True)
            self.config.save(written)
            for log in self.out.glob("*.csv"):
                self._forget_later(log)
        self.processes.wait()

    def _forget_later(self, log: Path) -> None:
        """Rows of steps after the checkpoint, which will come again."""
        with log.open(newline="") as file:
            head, *rows = csv.reader(file)
        with log.open("w", newline="") as file:
            csv.writer(file).writerows([head, *(row for row in rows if int(row[0]) <= self.step)])

    def _log(self, name: str, rows: list[dict[str, float]]) -> None:
        if not self.processes.first:
            return
        path = self.out / name
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            if new:
                writer.writeheader()
            writer.writerows(rows)


def parameter_groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices only."""
    groups: tuple[list[Tensor], list[Tensor]] = [], []
    for parameter in model.parameters():
        exempt = parameter.dim() < 2 or getattr(parameter, "_no_weight_decay", False)
        groups[exempt].append(parameter)
    decayed, others = groups
    return [{"params": decayed, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
