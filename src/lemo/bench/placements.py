"""Where a real model's kept tokens lie: recorded once, used by `lemo bench step` for models with random weights."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, ValidationError

from lemo.config import Frozen
from lemo.errors import UserError


class KeepPlacement(Frozen):
    """One share of kept tokens.

    Args:
        keep: share of each layer's tokens kept, labelled ones included.
        work: kept queries' share of the causal attention work, mean over layers.
        layers: per layer, bottom first: share of the kept unlabelled tokens in equal stretches of the prompt.
    """

    keep: float
    work: float
    layers: tuple[tuple[float, ...], ...] = Field(min_length=1)


class Placements(Frozen):
    """A recording, as `python -m benchmarks.record_placement` writes it."""

    model: str
    tokens: int
    labels: int
    sequences: int
    commit: str
    placements: tuple[KeepPlacement, ...]

    def for_layers(self, keep: float, layers: int) -> list[list[float]]:
        """Densities of a model with so many layers: each gets those of the layer at the same relative depth.

        Raises:
            UserError: this share wasn't recorded.
        """
        found = next((one for one in self.placements if one.keep == keep), None)
        if found is None:
            known = ", ".join(f"{one.keep:g}" for one in self.placements)
            raise UserError(
                f"placement recorded: keep {keep:g} isn't in the recording, which has {known}; use one of these, or "
                "record it"
            )
        last = len(found.layers) - 1
        return [list(found.layers[round(layer / max(1, layers - 1) * last)]) for layer in range(layers)]


def read_placements(path: Path) -> Placements:
    """A recording.

    Raises:
        UserError: no such file, or not a recording.
    """
    try:
        return Placements.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"placements {path}: {error.strerror}; check the path") from error
    except ValidationError as error:
        raise UserError(
            f"placements {path}: not a recording ({error.error_count()} faults); write one with "
            "python -m benchmarks.record_placement"
        ) from error
