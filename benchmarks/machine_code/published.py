"""What others have published of their kernels, at the sizes that ours are predicted for.

Read off figures and tables of other people's runs: nothing here was measured by this project.
"""

from __future__ import annotations

from ..running.shapes import BOTH, FORWARD, Shape, attention_flop

# FlashAttention-3 on an H100 80GB SXM5, float16, 16k tokens in all, causal: TFLOP/s by head
# dimension and length (figure 5 of https://arxiv.org/abs/2407.08608; FLOP are those of
# `attention_flop`). Its backward pass was published without a mask, which is faster (figure 6).
FORWARD_TFLOPS = {
    64: {512: 197, 1024: 265, 2048: 371, 4096: 420, 8192: 460, 16384: 473},
    128: {512: 292, 1024: 423, 2048: 521, 4096: 579, 8192: 602, 16384: 616},
}
BACKWARD_TFLOPS = {
    64: {512: 272, 1024: 363, 2048: 422, 4096: 453, 8192: 472, 16384: 474},
    128: {512: 316, 1024: 424, 2048: 501, 4096: 542, 8192: 559, 16384: 561},
}

# chunk_gated_delta_rule of flash-linear-attention 0.5.1 on an H200, D 128, in CUDA graphs: seconds
# of 64 heads and 16,384 tokens forward, and of 32 heads and 32,768 tokens backward, as many tokens
# times heads (https://github.com/QwenLM/FlashQLA, benchmark/benchmark_results_H200.txt, whose own
# kernels take 0.770 and 2.515 ms).
DELTA_RULE = {FORWARD: 1.598e-3, BOTH: 1.598e-3 + 5.697e-3}
DELTA_RULE_TOKENS = 64 * 16_384


def sdpa(shape: Shape, mode: str) -> float | None:
    """Seconds of causal attention, at the rate of the longest published length up to T."""
    if shape.D not in FORWARD_TFLOPS:
        return None
    length = max((T for T in FORWARD_TFLOPS[shape.D] if T <= shape.T), default=512)
    forward = attention_flop(shape, FORWARD)
    seconds = forward / (1e12 * FORWARD_TFLOPS[shape.D][length])
    if mode == BOTH:
        backward = attention_flop(shape, BOTH) - forward
        seconds += backward / (1e12 * BACKWARD_TFLOPS[shape.D][length])
    return seconds


def delta_rule(shape: Shape, mode: str) -> float | None:
    """Seconds of a gated delta rule, by tokens times heads; published for D 128."""
    if shape.D != 128:
        return None
    return DELTA_RULE[mode] * shape.B * shape.T * shape.H / DELTA_RULE_TOKENS
