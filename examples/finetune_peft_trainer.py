"""LeMo on a PEFT model with transformers' own Trainer: the three lines are marked.

    python examples/finetune_peft_trainer.py --model HuggingFaceTB/SmolLM2-135M-Instruct FILE...

Each file is one sequence: its last 256 tokens are labelled, what comes before is the prompt.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import lemo  # 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--output", default="runs/peft-trainer")
    parser.add_argument("--max-tokens", type=int, default=4096)
    parser.add_argument("--labelled", type=int, default=256, help="labelled tokens at the end of each file")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    rows = []
    for file in arguments.files:
        ids = tokenizer(file.read_text(encoding="utf-8"))["input_ids"][-arguments.max_tokens :]
        masked = max(0, len(ids) - arguments.labelled)
        rows.append({"input_ids": ids, "labels": [-100] * masked + ids[masked:]})

    model = AutoModelForCausalLM.from_pretrained(arguments.model)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    model = lemo.sparsify(model, lemo.SparsityConfig(mode="backward", fidelity=0.98))  # 2

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=arguments.output,
            max_steps=arguments.steps,
            per_device_train_batch_size=1,  # rows differ in length, and the default collator doesn't pad
            learning_rate=2e-4,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=rows,
    )
    trainer.train()
    stats = lemo.models.get_runtime(model).collect()
    print(f"kept {stats.keep_mean:.1%} of the tokens, fidelity {stats.fidelity_mean:.3f}")

    lemo.restore(model).save_pretrained(f"{arguments.output}/adapter")  # 3: an ordinary PEFT model again


if __name__ == "__main__":
    main()
