"""What the operators cost, and what the alternatives cost.

    python -m benchmarks            time, memory and profile on this machine, with the peers
    python -m benchmarks.evidence   what models with a memory learn
    python -m benchmarks.gpu        all of it on a GPU that is at hand for minutes, resumable
    python -m benchmarks.cluster    a plan for many GPUs, on paper
    python -m benchmarks.loss       a language model's loss, its logits whole or in pieces

    running/        cases, sizes and providers; the harness that checks, times and measures memory
    reporting/      tables, plots and the figures of docs/ from recorded results
    machine_code/   what the kernels compile to and a cost model, without a GPU; the tile tuner
    gpu/            the GPU kit
    evidence/       recall tasks
    results/        recorded runs

To add a case, add a record to `running/cases.py`. To add a peer, write a builder in
`running/providers.py` (or `running/peers.py`, for another sequence model) and name it in a case.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
