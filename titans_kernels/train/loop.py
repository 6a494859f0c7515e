"""The training loop: ordinary PyTorch, with the memory carried from step to step."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from ..adapt.versions import checkpointing
from ..decay import parameter_groups
from ..distributed.pieces import dimension_of_heads
from ..models import TitansCache, TitansConfig, TitansForCausalLM
from . import checkpoint, sharding
from .config import CHANGEABLE, Config
from .logs import Logs
from .measures import bits, by_doubling
from .processes import Processes
from .text import excerpts, read_text, tokenizer_of, windows

BACKGROUND = 10  # steps that an asynchronous checkpoint has before training waits for it
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class Training:
    """A run: `run()` takes it to its last step, from wherever it is."""

    def __init__(self, config: Config, processes: Processes) -> None:
        self.config, self.processes = config, processes
        self.out, self.step = Path(config.out), 0
        self._agree()
        self.rows = processes.own_rows(config.rows)
        torch.manual_seed(config.seed)
        self._read_text()
        if processes.count > 1:
            processes.agree({"data, its checksum": self._text_checksum()})
        self.model = model_of(config)
        self.model.to(processes.device).train()
        if config.gradient_checkpointing:
            getattr(self.model, f"{checkpointing()}_enable")()
        sharding.shard(self.model, processes)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, config.weight_decay), betas=(0.9, 0.95)
        )
        self.cache = TitansCache(len(self.model.model.layers))
        self.finish: Callable[[], None] | None = None  # of the checkpoint that is being written
        self.named_at = 0
        self._resume()
        if processes.first:
            self.out.mkdir(parents=True, exist_ok=True)
            config.save(self.out / "config.json")
            self.logs = Logs(self.out, self.step, config.tensorboard)
        processes.wait()

    def _agree(self) -> None:
        """Each process has the same configuration; but a device of its own."""
        given = asdict(self.config)
        model = {f"model.{name}": value for name, value in given.pop("model").items()}
        self.processes.agree({n: x for n, x in given.items() if n != "device"} | model)

    def _read_text(self) -> None:
        """The files that are long enough."""
        config = self.config
        self.tokenizer = None if config.tokenizer is None else tokenizer_of(config.tokenizer)
        text = read_text(config.data, config.pattern, self.tokenizer)
        self.unit = "byte" if self.tokenizer is None else "token"
        least = config.pieces * config.length + 1, config.evaluate_length + 1
        self.files = [file for file in text.train if len(file) >= least[0]]
        self.held_out = [file for file in text.held_out if len(file) >= least[1]]
        if not self.files:
            raise ValueError(f"pieces, length: no file is {least[0]} {self.unit}s long")
        if min(len(self.held_out), config.evaluate_files) < self.processes.place("data")[1]:
            raise ValueError(
                f"evaluate_files, evaluate_length: {len(self.held_out)} files held out are "
                f"{least[1]} {self.unit}s long, takes one for each process at least"
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
                    bar.set_postfix_str(f"{row['bits']:.3f} bits per {self.unit}", refresh=False)
                    self._log("train", [row])
                if self.step % config.evaluate_every == 0 or last:
                    self._log("evaluation", self.evaluate())
                if self.step % config.checkpoint_every == 0 or last:
                    self._save()
                if self.step >= self.named_at:
                    self._finish_saving()
        self._finish_saving()
        if self.step == config.steps:
            sharding.save_model(self.model, self.out / "model", self.processes)
            if self.tokenizer is not None and self.processes.first:
                self.tokenizer.save_pretrained(self.out / "model")
        self.processes.wait()

    def _train_step(self) -> dict[str, Any]:
        """One piece of text of every row, one step of the optimizer."""
        config = self.config
        window, piece = divmod(self.step, config.pieces)
        if piece == 0:
            self.cache.reset()
        start = piece * config.length
        text = self._window(window)[:, start : start + config.length + 1]
        rate = rate_of(config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        own = self.processes.own_tokens(config.length)
        tokens, targets = text[:, :-1][:, own], text[:, 1:][:, own].contiguous()
        count = config.rows * config.length  # of all processes, whose losses are summed
        labels = {"labels": tokens, "shift_labels": targets, "num_items_in_batch": count}
        with self._precision():
            out = self.model(tokens, past_key_values=self.cache, use_cache=True, **labels)
        loss = out.loss / math.log(2)
        self.optimizer.zero_grad(set_to_none=True)
        # FSDP2 takes the mean of the gradients, of which the sum is wanted.
        (loss * self.processes.place("data")[1] * self.processes.place("length")[1]).backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.optimizer.step()
        self.cache.detach()
        self.step += 1
        mean = self.processes.sum(loss.detach(), "data", "length")
        return {"step": self.step, "bits": mean, "learning_rate": rate, "gradient": norm}

    @torch.no_grad()
    def evaluate(self) -> list[dict[str, float]]:
        """Bits per byte of held-out text, by how much of it has been read."""
        config, processes = self.config, self.processes
        mine = slice(processes.place("data")[0], None, processes.place("data")[1])
        longest, files = config.evaluate_length + 1, config.evaluate_files
        text = excerpts(self.held_out, longest, files)[mine].to(processes.device)
        self.model.eval()
        chunk = self.model.config.loss_chunk  # logits of no more tokens at a time
        size = min(config.length, max(1, (chunk or text.numel()) // len(text)))
        parts = (t.split(size, 1) for t in (text[:, :-1], text[:, 1:]))
        cache, costs = TitansCache(len(self.cache)), []
        for now, after in zip(*parts, strict=True):
            own = processes.own_tokens(now.shape[1])
            with self._precision():
                logits = self.model(now[:, own], past_key_values=cache, use_cache=True).logits
            cost = torch.zeros(now.shape, device=now.device)
            cost[:, own] = bits(logits.float(), after[:, own])
            costs.append(processes.sum(cost, "length"))
        self.model.train()
        sharding.reshard(self.model)
        ends, means = by_doubling(torch.cat(costs, 1), config.length)
        rows = torch.tensor(float(len(text)), device=processes.device)
        means = processes.sum(means.sum(0), "data") / processes.sum(rows, "data")
        starts = [0, *ends.tolist()]
        return [
            {"step": self.step, "from": a, "to": b, "bits": float(mean)}
            for a, b, mean in zip(starts, ends.tolist(), means, strict=False)
        ]

    def _window(self, index: int) -> Tensor:
        """Text of `pieces` steps, [rows, pieces length + 1]: each row a function of its place.

        So a resumed run, on any number of processes, reads what it would have read.
        """
        config = self.config
        generators = []
        for row in self.rows:
            (seed,) = np.random.SeedSequence([config.seed, index, row]).generate_state(1, np.uint64)
            generators.append(torch.Generator().manual_seed(int(seed)))
        length = config.pieces * config.length + 1
        return windows(self.files, length, generators).to(self.processes.device)

    def _precision(self) -> Any:
        kind = self.processes.device.type
        bf16 = self.config.bf16 and kind == "cuda"
        return torch.autocast(kind, torch.bfloat16) if bf16 else nullcontext()

    def _log(self, name: str, rows: list[dict[str, float]]) -> None:
        if self.processes.first:
            self.logs.write(name, rows)

    # ----------------------------------------------------------------------------- checkpoints

    def _save(self) -> None:
        facts = {"config": asdict(self.config), "text": self._text_checksum()}
        tensors = self._tensors(*self._state_dicts())
        tensors["memory"] = self._memories(self.cache)[0]
        self._finish_saving()
        self.finish = checkpoint.save(
            self.out / "checkpoints",
            self.step,
            tensors,
            facts,
            self.processes,
            self.config.keep,
            self.config.asynchronous,
        )
        self.named_at = self.step + (BACKGROUND if self.config.asynchronous else 0)

    def _finish_saving(self) -> None:
        """All processes at the same step: they wait for each other."""
        if self.finish is not None:
            self.finish()
            self.finish = None

    def _resume(self) -> None:
        """Resume from the newest complete checkpoint in the folder, or begin there."""
        find = partial(checkpoint.newest, self.out / "checkpoints")
        found = self.processes.from_first(find)
        if found is None:
            return
        path, facts = found
        self._check_same_run(path, facts)
        self.step = facts["step"]
        model, optimizer = self._state_dicts()
        cache, carried = TitansCache(len(self.cache)), self.step % self.config.pieces
        if carried:
            # One token shows the shapes of the states, which are those of any number of tokens.
            token = torch.zeros(len(self.rows), 1, dtype=torch.int64, device=self.processes.device)
            with torch.no_grad(), self._precision():
                self.model(token, past_key_values=cache, use_cache=True)
            sharding.reshard(self.model)
        memories, structure, own = self._memories(cache)
        tensors = self._tensors(model, optimizer) | {"memory": memories}
        checkpoint.load(path, tensors, self.processes)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=model,
            optim_state_dict=optimizer,
            options=FLAT,
        )
        if carried:
            states = pytree.tree_unflatten(own, structure)
            for layer, state in zip(self.cache.layers, states, strict=True):
                layer.store(state, carried * self.config.length)

    def _state_dicts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return get_state_dict(self.model, self.optimizer, options=FLAT)

    def _tensors(self, model: dict[str, Any], optimizer: dict[str, Any]) -> dict[str, Any]:
        """What of both is in tensors, tied ones once; rates and such are the configuration's."""
        named = *self.model.named_parameters(), *self.model.named_buffers()
        once = {name: model[name] for name, _ in named if name in model}
        moments = {name: x for name, x in optimizer.items() if isinstance(x, Tensor)}
        return {"model": once, "optimizer": moments}

    def _memories(self, cache: TitansCache) -> tuple[dict[str, Tensor], Any, list[Tensor]]:
        """The states that the next step continues from, rows of all processes; our own, copied.

        None between windows, each of which begins with empty memories.
        """
        states = [layer.state for layer in cache.layers]
        leaves, structure = pytree.tree_flatten_with_path(states)
        if self.step % self.config.pieces == 0:
            leaves = []
        # A state may be a view of a parameter, into which nothing must be read.
        own = [x.detach().clone(memory_format=torch.contiguous_format) for _, x in leaves]
        heads = [dimension_of_heads(path, x) for path, x in leaves]
        pairs = enumerate(zip(own, heads, strict=True))
        rows = {f"{i:04d}": self.processes.whole(x, dim) for i, (x, dim) in pairs}
        return rows, structure, own

    def _check_same_run(self, path: Path, facts: dict[str, Any]) -> None:
        # A version that did not have an option did what is now its default.
        before, now = asdict(Config()) | facts["config"], asdict(self.config)
        changed = [n for n in now if n not in CHANGEABLE and now[n] != before[n]]
        if changed:
            raise ValueError(f"{path}: the run there has other {', '.join(changed)}")
        if self.config.steps < facts["step"]:
            raise ValueError(
                f"steps: got {self.config.steps}, takes at least {facts['step']}, which the run "
                f"in {self.out} has done"
            )
        if facts["text"] != self._text_checksum():
            raise ValueError(f"data: other text than the run in {self.out} has read so far")

    def _text_checksum(self) -> int:
        checksum = 0
        for file in [*self.files, *self.held_out]:
            checksum = zlib.crc32(file.numpy().tobytes(), checksum)
        return checksum


def model_of(config: Config) -> TitansForCausalLM:
    """A new model, or with the parameters of the one that the run starts with.

    Raises:
        ValueError: if that one has not all of them, or others.
    """
    options = TitansConfig(**config.model_options())
    if config.start is None:
        return TitansForCausalLM(options)
    model, found = TitansForCausalLM.from_pretrained(
        config.start, config=options, dtype=torch.float32, output_loading_info=True
    )
    strange = sorted({*found["missing_keys"], *found["unexpected_keys"]})
    if strange:
        raise ValueError(f"start: {config.start} and `model` do not both have {', '.join(strange)}")
    return model


def rate_of(config: Config, step: int) -> float:
    """The learning rate of a step: a linear warm-up, then a cosine down to a tenth at the last.

    A function of the step, so that raising `steps` draws the cosine longer from there on.
    """
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))
