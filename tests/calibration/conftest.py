"""Models trained once a session, and their calibrations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from trained import TOKENS, save_text, train

from lemo.calibration.config import CalibrationConfig, load_calibration
from lemo.calibration.job import calibrate

QUICK = (
    f"data.max_tokens={TOKENS}",
    "data.heldout_share=0.2",
    "block_size=16",
    "predictor.steps=300",
    # Half of the heads; with all of them nothing would be estimated.
    "predictor.rank=48",
    "predictor.head_steps=100",
    "predictor.widths=[24,16]",
    "predictor.size=0.65",
    "bypass_rank=8",
    "judge_sequences=5",
)


class Place:
    """Where the session's models, texts and calibrations lie."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.texts = save_text(root / "texts")

    def model(self, family: str) -> Path:
        """A trained model's directory."""
        directory = self.root / family
        if not directory.exists():
            torch.set_num_threads(1)
            # Bytes of text at random have 5.5 nats.
            assert train(family, directory, self.texts) < 3.5
        return directory

    def config(self, family: str, output: Path, *overrides: str) -> CalibrationConfig:
        """A quick calibration of that model."""
        return load_calibration(
            None,
            data=str(self.texts),
            model=str(self.model(family)),
            output=str(output),
            device="cpu",
            overrides=[*QUICK, *overrides],
        )

    def calibration(self, family: str) -> Path:
        """A finished calibration's directory, which no test changes."""
        directory = self.root / f"{family}-calibration"
        if not directory.exists():
            # The others keep half, then; with the default two thirds short runs would have hardly a sparse pass.
            calibrate(self.config(family, directory, "dense_share=0.5"))
        return directory


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("calibration"))
