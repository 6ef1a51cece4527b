"""How many bytes a training step stores for its backward and moves, by method: what measured memory is compared with.

Arithmetic, not a measurement. Half precision with the adapters in fp32, under autocast, as `lemo bench step` runs. Per
token and layer, in numbers of 2 bytes, with D the width, A = query heads · head size, K = key heads · head size, F the
MLP's width:

| stored | transformers and PEFT | `forward`, of a kept token |
|---|---|---|
| norms | 2 · 2 D: their inputs' fp32 copies | 2 D: the rows before the norms |
| LoRA | the input of each adapted linear, cast for each anew | none: q's, k's and v's is the norm, computed again |
| attention | A + 2 K + A | the same; the output is o's input too |
| MLP | 3 F: gate, its activation, up | 2 F: gate, up |
| MLP without a gate (ReLU) | F: the activation | F / 16: a bit of each number; F if the next linear has LoRA |
| norms after the addition | 2 · 2 D: their inputs are fp32 | D, each LoRA's input; 2 · 2 D of every token |

LoRA's inner numbers, norms' reciprocals and softmax denominators are left out: less than 1%. With checkpointing, and in
`backward` mode, D of every token.

Moved are the operands and results of matrix products, each once a product, and passes over the residual stream: a
branch of transformers' 5 forward (norm 2, addition 3) and 8 backward, of `forward` 5 k and 6 k beside a copy each way
(`lemo.bench.op_movement`); attention's own operands once forward and twice backward, the activation's 3 F and 5 F, or 2
F and 3 F without a gate, 2 F with bits.
"""

from __future__ import annotations

from lemo.bench.shapes import Widths
from lemo.bench.step_config import checkpointed

_BYTES = 2


def stored_bytes(
    shape: str,
    layers: int,
    T: int,
    method: str,
    targets: str | tuple[str, ...],
    keep: float = 1.0,
    mlp_keep: float = 1.0,
) -> float:
    """Bytes that all layers store for the backward of one sequence.

    Args:
        shape: a key of `SHAPES`.
        layers: of the measured model.
        T: tokens.
        method: as in the records.
        targets: linears with LoRA.
        keep, mlp_keep: `lemo-forward`: shares of tokens kept in attention and MLPs.
    """
    w = Widths.of(shape)
    if checkpointed(method) or method.startswith("lemo-backward"):
        return float(layers * T * _BYTES * w.D)
    attention, norms = 2 * w.A + 2 * w.K, 2 * 2 * w.D
    if method.startswith("lemo-forward"):
        (*_, down) = w.mlp
        wide = 2.0 if w.gated else 1.0 if targets == "all-linear" or down in targets else 1 / 16
        per_token = keep * (w.D + attention) + mlp_keep * (w.D + wide * w.F)
        per_token += 0 if w.pre_norm else norms - mlp_keep * w.D
    else:
        linears = {**w.attention, **w.mlp}
        adapted = sum(width for name, (width, _) in linears.items() if targets == "all-linear" or name in targets)
        per_token = norms + adapted + attention + (3 if w.gated else 1) * w.F
    return float(layers * T * _BYTES * per_token)


def moved_bytes(shape: str, layers: int, T: int, method: str, keep: float = 1.0, mlp_keep: float = 1.0) -> float:
    """Bytes that all layers' steps move at least; arguments as above, `lemo-backward` isn't counted."""
    w = Widths.of(shape)
    sparse = method.startswith("lemo-forward")
    k_attention, k_mlp = (keep, mlp_keep) if sparse else (1.0, 1.0)
    forwards = 2 if checkpointed(method) else 1
    weights = sum(width * out for width, out in (*w.attention.values(), *w.mlp.values()))
    in_attention, in_mlp = (sum(width + out for width, out in linears.values()) for linears in (w.attention, w.mlp))
    # Gradients of inputs alone: one product for each of the forward's.
    per_token = (forwards + 1) * (k_attention * in_attention + k_mlp * in_mlp)
    per_token += (forwards + 2) * k_attention * 2 * (w.A + w.K)
    of_relu = 2 if sparse and forwards == 1 else 3
    per_token += (forwards * 3 + 5 if w.gated else forwards * 2 + of_relu) * k_mlp * w.F
    forward, backward, copy = (5, 6, 2) if sparse else (5, 8, 0)
    per_token += ((forwards * forward + backward) * (k_attention + k_mlp) + (forwards + 1) * copy) * w.D
    return float(layers * _BYTES * ((forwards + 1) * weights + T * per_token))
