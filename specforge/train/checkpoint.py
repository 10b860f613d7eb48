"""Checkpoints: a draft folder that servers load, plus what exact resume needs, in one folder that appears at once."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from specforge.draft import folder as draft_folder
from specforge.draft.model import Eagle3Draft
from specforge.errors import CheckpointError
from specforge.files import sync_file, write_json


@dataclass(kw_only=True)
class RunState:
    """Where a run is. Everything else follows from its settings, seed and data."""

    updates: int = 0  # optimizer steps done
    applied: int = 0  # of them, those that were not skipped
    epoch: int = 0  # the epoch that the next step belongs to
    step_in_epoch: int = 0
    best_length: float = 0.0  # simulated decoding length on held-out text
    best_epoch: int = -1
    norms: list[float] = field(default_factory=list)  # of the gradient, in the last steps that were applied
    skipped_in_a_row: int = 0
    went_back: bool = False


def save(
    folder: Path,
    draft: Eagle3Draft,
    kept_D: Tensor,
    tensors: dict[str, Tensor],
    state: RunState,
    identity: dict[str, Any],
    dtype: torch.dtype,
) -> None:
    """A checkpoint under `folder`/step-N. `tensors` are the optimizer's, see DraftOptimizer.state."""
    final = folder / f"step-{state.updates:07d}"
    beside = folder / f".{final.name}.tmp"
    weights = {name: tensors[name] for name in draft.state_dict()}
    draft_folder.save(beside, draft, kept_D, weights, dtype)
    save_file(tensors, beside / "optimizer.safetensors")
    sync_file(beside / "optimizer.safetensors")
    write_json(beside / "state.json", {"state": asdict(state), "identity": identity})
    draft_folder.replace_folder(beside, final)


def keep_newest(folder: Path, count: int) -> None:
    for old in checkpoints(folder)[:-count]:
        shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / "state.json").is_file())


def newest_identity(folder: Path) -> dict[str, Any] | None:
    """The identity of the run in the folder; None where it has no readable checkpoint (`load` says why)."""
    try:
        return json.loads((checkpoints(folder)[-1] / "state.json").read_text(encoding="utf-8"))["identity"]
    except (IndexError, OSError, ValueError, KeyError):
        return None


def load(path: Path, identity: dict[str, Any]) -> tuple[RunState, dict[str, Tensor]]:
    """Raises CheckpointError where the checkpoint is damaged or of another run, naming the first field."""
    fix = "remove the output folder, choose another --output, or use --no-resume to start anew"
    try:
        content = json.loads((path / "state.json").read_text(encoding="utf-8"))
        tensors = load_file(path / "optimizer.safetensors")
        state = RunState(**content["state"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"the checkpoint is damaged: {error}", where=str(path), fix=fix) from error
    for name, value in identity.items():
        if content["identity"].get(name) != value:
            raise CheckpointError(
                f"the run in the output folder has another {name}: {content['identity'].get(name)}, now {value}",
                where=f"{path}/state.json, '{name}'",
                fix=fix,
            )
    return state, tensors
