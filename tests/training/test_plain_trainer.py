"""transformers.Trainer as users run it: a resumed run is the uninterrupted one, though modes draw at random."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import lemo
from lemo.config import Attend, Segments, SparsityConfig
from lemo.errors import UserError
from lemo.models import runtime
from lemo.training import SparsityCallback
from tiny import VOCAB, build

SETTINGS = {
    "segments": SparsityConfig(policy="segments", segments=Segments(spans=4, drawn=1), block_size=4),
    "random": SparsityConfig(policy="random", keep=0.5, labelled="ranked", block_size=4),
    "attend": SparsityConfig(mode="dense", attend=Attend(density=0.5, block=2, choice="sampled")),
    "forward": SparsityConfig(mode="forward", keep=0.5, dense_share=0.5, block_size=4),
}


class Documents(Dataset):
    """Nine documents, every token labelled."""

    def __init__(self) -> None:
        self.ids = torch.randint(4, VOCAB, (9, 40), generator=torch.Generator().manual_seed(2))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def train(folder: Path, settings: SparsityConfig, *, resume: bool = False) -> dict[str, Tensor]:
    """Seven steps, which cross an epoch, with checkpoints after the third and the sixth; trained parameters."""
    torch.manual_seed(int(resume))
    return train_model(lemo.sparsify(build("llama", lora_dropout=0.1), settings), folder, resume=resume)


def train_model(model: Any, folder: Path, *, resume: bool, callbacks: Any = None) -> dict[str, Tensor]:
    """The same, of a sparsified model."""
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=7,
        save_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model=model, args=args, train_dataset=Documents(), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume or None)
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def bypassed(*, wraps: bool) -> Any:
    model = lemo.sparsify(
        build("llama", lora=wraps), SparsityConfig(mode="forward", keep=0.5, train_bypass=True, block_size=4)
    )
    lemo.models.fit_bypasses(model, [{"input_ids": Documents().ids}], rank=4)
    return model


@pytest.mark.parametrize("wraps", [True, False])
def test_bypasses_that_train_resume_with_the_callback(
    wraps: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A PEFT checkpoint leaves them out."""

    def run(folder: str, *, resume: bool = False) -> dict[str, Tensor]:
        return train_model(bypassed(wraps=wraps), tmp_path / folder, resume=resume, callbacks=[SparsityCallback()])

    whole = run("whole")
    assert sum("lemo_bypasses" in name for name in whole) == 18
    shutil.copytree(tmp_path / "whole/checkpoint-3", tmp_path / "parts/checkpoint-3")
    assert same(run("parts", resume=True), whole)
    file = tmp_path / "parts/checkpoint-7/lemo_forward.safetensors"
    assert not caplog.records
    for damage in (lambda: file.write_bytes(file.read_bytes()[:100]), file.unlink):
        damage()
        with pytest.raises(UserError, match=r"checkpoint-7/lemo_forward.* written with lemo\.training\.SparsityC"):
            run("parts", resume=True)
    train_model(bypassed(wraps=True), tmp_path / "without", resume=False)
    assert [record.getMessage() for record in caplog.records if "SparsityCallback" in record.getMessage()]
    assert len(caplog.records) == 1


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_resumed_run_is_the_uninterrupted_one(name: str, tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", SETTINGS[name])
    shutil.copytree(tmp_path / "whole/checkpoint-3", tmp_path / "parts/checkpoint-3")
    assert same(train(tmp_path / "parts", SETTINGS[name], resume=True), whole)


class Work(TrainerCallback):
    """What each step kept, or its queries saw."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        found = lemo.models.get_runtime(model)
        assert found is not None
        stats = found.collect()
        self.found.append(stats.keep_mean if stats.density is None else stats.density)


@pytest.mark.parametrize("name", ["forward", "attend"])
def test_the_first_passes_run_dense_where_the_trainer_tells(name: str, tmp_path: Path) -> None:
    """Four of seven steps with a share of a half, also where a checkpoint goes on among them."""
    settings = SETTINGS[name].model_copy(update={"dense_share": 0.5})

    def work(folder: str, *, resume: bool = False) -> list[float]:
        seen = Work()
        model = lemo.sparsify(build("llama", lora=True), settings)
        train_model(model, tmp_path / folder, resume=resume, callbacks=[SparsityCallback(), seen])
        assert lemo.models.get_runtime(model).progress is None
        return seen.found

    whole = work("whole")
    assert whole[:4] == [1.0] * 4
    assert all(value < 0.8 for value in whole[4:])
    shutil.copytree(tmp_path / "whole/checkpoint-3", tmp_path / "parts/checkpoint-3")
    assert work("parts", resume=True) == whole[3:]


def test_draws_follow_the_users_seed(tmp_path: Path) -> None:
    model: Any = lemo.sparsify(build("llama"), SETTINGS["segments"])
    ids = Documents().ids

    def spans(seed: int) -> list[Any]:
        torch.manual_seed(seed)
        drawn = []
        for _ in range(4):
            model(input_ids=ids, labels=ids)
            drawn.append(lemo.models.get_runtime(model).last_spans)
        return drawn

    first = spans(0)
    assert len({str(one) for one in first}) == 4
    assert spans(0) == first != spans(1)


def test_ranks_draw_on_their_own_and_run_dense_together(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SETTINGS["segments"].model_copy(update={"attend": Attend(density=0.5, block=2), "dense_share": 0.5})
    model: Any = lemo.sparsify(build("llama"), settings)
    ids = Documents().ids
    found = lemo.models.get_runtime(model)
    monkeypatch.setattr(runtime, "is_initialized", lambda: True)
    seen: list[list[tuple[bool, Any]]] = []
    for rank in range(2):
        monkeypatch.setattr(runtime, "get_rank", lambda rank=rank: rank)
        torch.manual_seed(0)
        seen.append([])
        for _ in range(12):
            model(input_ids=ids, labels=ids)
            seen[-1].append((found.state.dense, found.last_spans))
    dense = [[dense for dense, _ in passes] for passes in seen]
    assert dense[0] == dense[1]
    assert 0 < sum(dense[0]) < 12
    assert all(one != other for (_, one), (_, other) in zip(*seen, strict=True))
