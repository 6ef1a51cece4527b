"""LeMo with TRL's SFTTrainer, on a JSONL file whose lines hold `prompt` and `completion`.

    python examples/finetune_trl.py --model HuggingFaceTB/SmolLM2-135M-Instruct data.jsonl

SFTTrainer computes its own loss. Mode `backward` with policy `energy`, mode `forward` and mode `dense` work with it.
Policy `segments` weights its loss inside the model, so the model refuses to train under SFTTrainer with it.
"""

from __future__ import annotations

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import lemo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--output", default="runs/trl")
    parser.add_argument("--max-tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(arguments.model)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    model = lemo.sparsify(model, lemo.SparsityConfig(mode="backward", fidelity=0.98))

    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=arguments.output,
            max_steps=arguments.steps,
            max_length=arguments.max_tokens,
            per_device_train_batch_size=1,
            # Mode backward stores one tensor a layer by itself.
            gradient_checkpointing=False,
            bf16=torch.cuda.is_available(),
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=load_dataset("json", data_files=arguments.file, split="train"),
        processing_class=AutoTokenizer.from_pretrained(arguments.model),
    )
    trainer.train()
    stats = lemo.models.get_runtime(model).collect()
    print(f"kept {stats.keep_mean:.1%} of the tokens, fidelity {stats.fidelity_mean:.3f}")
    lemo.restore(model).save_pretrained(f"{arguments.output}/adapter")


if __name__ == "__main__":
    main()
