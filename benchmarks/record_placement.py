"""Records where the tokens lie that `backward` mode keeps in the embedded model, for `lemo bench step`.

`python -m benchmarks.record_placement` writes benchmarks/step/placement_smollm2.json: the built-in model on long files
of Python's library, the last 512 tokens labelled, a new LoRA adapter; a few minutes on a CPU.
"""

from __future__ import annotations

from pathlib import Path

import torch

from lemo.bench.config import TaskConfig
from lemo.bench.cost import causal_work
from lemo.bench.placements import KeepPlacement, Placements
from lemo.bench.records import commit
from lemo.bench.tasks import build_task
from lemo.config import ModelConfig, RunConfig, SparsityConfig
from lemo.data import Collator
from lemo.models import get_runtime, restore, sparsify
from lemo.models.device import choose_device
from lemo.models.loading import load_model
from lemo.training.job import prepare_model
from lemo.types import TokenPlan

FILE = Path(__file__).parent / "step" / "placement_smollm2.json"
TOKENS, LABELS, SEQUENCES, STRETCHES = 8192, 512, 6, 64
KEEPS = (0.125, 0.25)


def record() -> Placements:
    """Runs every sequence once for each share."""
    device = choose_device("auto")
    base, tokenizer = load_model(ModelConfig(), device)
    task = TaskConfig(
        kind="sft", max_tokens=TOKENS, min_tokens=TOKENS - LABELS - 512, completion_tokens=(LABELS, LABELS)
    )
    rows = build_task(task, tokenizer).train.select(range(SEQUENCES))
    collate = Collator.for_tokenizer(tokenizer)
    batches = [{key: value.to(device) for key, value in collate([row]).items()} for row in rows]
    model = restore(prepare_model(base, RunConfig(sparsity=SparsityConfig(mode="dense"))))
    model.train()
    placements = []
    for keep in KEEPS:
        runtime = get_runtime(sparsify(model, SparsityConfig(fidelity=1.0, keep=keep)))
        assert runtime is not None, "sparsify makes one"
        counts = torch.zeros(runtime.layers, STRETCHES)
        work = []
        for batch in batches:
            model(**batch).loss.backward()
            model.zero_grad()
            T = batch["input_ids"].shape[1]
            plans = [runtime.last_plans[layer, "attention"] for layer in range(runtime.layers)]
            counts += torch.stack([prompt_counts(plan, T - LABELS - 1) for plan in plans])
            work.append(causal_work(plans, T))
        shares = (counts / counts.sum(1, keepdim=True).clamp(min=1)).double()
        # The last layer keeps labelled tokens alone.
        shares[counts.sum(1) == 0] = 1 / STRETCHES
        layers = tuple(tuple(round(share, 5) for share in layer) for layer in shares.tolist())
        placements.append(KeepPlacement(keep=keep, work=round(sum(work) / len(work), 4), layers=layers))
        restore(model)
    return Placements(
        model=ModelConfig().name,
        tokens=TOKENS,
        labels=LABELS,
        sequences=SEQUENCES,
        commit=commit(),
        placements=tuple(placements),
    )


def prompt_counts(plan: TokenPlan, prompt: int) -> torch.Tensor:
    """Kept tokens in equal stretches of the prompt, [stretches]."""
    rows = plan.host_rows[plan.host_rows < prompt]
    return torch.bincount(rows * STRETCHES // prompt, minlength=STRETCHES).float()


if __name__ == "__main__":
    recorded = record()
    FILE.write_text(recorded.model_dump_json(indent=1) + "\n", encoding="utf-8")
    for one in recorded.placements:
        print(f"keep {one.keep:g}: {one.work:.3f} of the causal attention work")
