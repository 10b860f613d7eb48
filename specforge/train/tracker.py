"""The figures of metrics.jsonl for those who watch curves: TensorBoard files, or Weights & Biases."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from specforge.errors import ConfigError


def check(kind: str) -> None:
    """Raises ConfigError where the tracker is not installed."""
    if kind == "wandb" and importlib.util.find_spec("wandb") is None:
        fix = "pip install wandb, or use --tracker tensorboard"
        raise ConfigError("Weights & Biases is not installed", where="--tracker wandb", fix=fix)


class Tracker:
    """Of the main rank. `settings` are shown beside the curves where the tracker can."""

    def __init__(self, kind: str, folder: Path, settings: dict[str, Any]) -> None:
        self._wandb = self._board = None
        if kind == "wandb":
            import wandb

            self._wandb = wandb.init(project="specforge", dir=str(folder), config=settings, resume="allow")
        else:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"))

    def write(self, row: dict[str, Any], step: int) -> None:
        """A line of metrics.jsonl, after `step` optimizer steps."""
        group = "held_out" if "held_out" in row else "train"
        found = dict(_numbers(row.get("held_out", row), group))
        if self._wandb:
            self._wandb.log(found, step=step)
        elif self._board:
            for name, value in found.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        if self._wandb:
            self._wandb.finish()
        elif self._board:
            self._board.close()


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    """Lists and mappings become curves of their own: train/loss_by_step/0."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield from _numbers(one, f"{name}/{key}")
    elif isinstance(value, list):
        for number, one in enumerate(value):
            yield from _numbers(one, f"{name}/{number}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, float(value)
