"""What titans-pytorch has and `titans_pytorch.py` has not, each with the reason."""

from __future__ import annotations

from typing import Any, NoReturn

# Arguments that take one value, and why no other.
ONLY: dict[str, tuple[Any, str]] = {
    "store_memory_loss_fn": (None, "the loss is the mean of (M(k) - v)^2 over the head"),
    "attn_pool_chunks": (False, "chunks of one token leave nothing to pool"),
    "momentum_order": (1, "momentum is of first order"),
    "learned_momentum_combine": (False, "momentum is of first order"),
    "learned_combine_include_zeroth": (False, "momentum is of first order"),
    "num_kv_per_token": (1, "a token has one key and one value"),
    "qkv_receives_diff_views": (False, "keys and values are made of the same tokens"),
    "max_grad_norm": (None, "surprises are not clamped"),
    "accept_weight_residual": (False, "memories of other layers are not taken"),
    "spectral_norm_surprises": (False, "surprises are not orthogonalised"),
    "gated_transition": (False, "a batch begins with all that has been learned"),
    "mem_model_norm_add_residual": (
        False,
        "its LayerNorm's scale is learned while reading; titans_kernels.NeuralMemory has a "
        "residual and a LayerNorm that is learned in training",
    ),
    "store_with_lookahead_value": (False, "a key is trained on the value of its own token"),
    "prev_weights": (None, "memories of other layers are not taken"),
    "return_surprises": (False, "losses of single tokens are not kept"),
}


def refuse_others(given: dict[str, Any]) -> None:
    for name, (takes, why) in ONLY.items():
        got = given.get(name, takes)
        if got is not takes and got != takes:
            raise ValueError(f"{name}: got {got!r}, takes {takes!r}: {why}")


# Names of its package, and what to use instead.
ELSEWHERE: dict[str, str] = {
    "MemoryAsContextTransformer": "its checkpoints hold hyper connections and another form of MAC; "
    "titans_kernels.models has Titans models of their own, and a NeuralMemory inside a checkpoint "
    "is loaded by TitansPytorchMemory from the entries below its name",
    **dict.fromkeys(
        ("MemoryAttention", "FactorizedMemoryMLP", "MemorySwiGluMLP", "GatedResidualMemoryMLP"),
        "a memory is an MLP with GELU: default_model_kwargs gives depth and expansion_factor",
    ),
    "MemoryMLP": "model takes theirs, and default_model_kwargs makes one",
    "store_memories": "it returns the weights after every token, which are never made here; call "
    "the module, which updates the memory and returns it: retrieved, state = memory(seq, state=s)",
}


def refuse_name(name: str, error: type[Exception]) -> NoReturn:
    raise error(f"{name}: not here: {ELSEWHERE[name]}")
