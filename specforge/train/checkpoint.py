"""Checkpoints: a draft folder that servers load, plus what exact resume needs, in one folder that appears at once.
state.json is sealed, and holds a checksum of each other file: a damaged one is found, and the one before taken."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from typing_extensions import TypedDict  # pydantic takes that of Python from 3.12 on only

from specforge.console import say
from specforge.draft import folder as draft_folder
from specforge.draft.model import Eagle3Draft
from specforge.errors import CheckpointError, first_line
from specforge.files import digest, replacing, seal, sync_file, unseal

STATE, OPTIMIZER = "state.json", "optimizer.safetensors"


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


class _Content(TypedDict):
    """Of state.json."""

    state: RunState
    identity: dict[str, Any]
    files: dict[Annotated[str, Field(pattern=r"^[a-z]+\.(json|safetensors)$")], str]  # checksums


CONTENT = TypeAdapter(_Content)


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
    with writing(beside):
        draft_folder.save(beside, draft, kept_D, weights, dtype)
        save_file(tensors, beside / OPTIMIZER)
        sync_file(beside / OPTIMIZER)
        files = {path.name: digest(path) for path in sorted(beside.iterdir())}
        with replacing(beside / STATE) as file:
            file.write(seal({"state": asdict(state), "identity": identity, "files": files}, indent=2) + "\n")
        draft_folder.replace_folder(beside, final)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Raises CheckpointError where the disk does not take it; what was there before stays."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint cannot be written: {first_line(error)}",
            where=str(folder.parent),
            fix="free disk space, or lower --keep; the same command goes on from the last checkpoint",
        ) from error


def keep_newest(folder: Path, count: int) -> None:
    for old in checkpoints(folder)[:-count]:
        shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    """Those that were finished, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / STATE).is_file())


def newest_identity(folder: Path) -> dict[str, Any] | None:
    """The identity of the run in the folder; None where it has no whole checkpoint (`load_newest` says why)."""
    contents = (_content(path) for path in reversed(checkpoints(folder)))
    return next((content["identity"] for content in contents if content), None)


def load_newest(folder: Path, identity: dict[str, Any]) -> tuple[Path, RunState, dict[str, Tensor]] | None:
    """The newest checkpoint that is whole, and a warning for each damaged one behind it; None where there is none.
    Raises CheckpointError where all are damaged, or it is of another run, naming the first field."""
    found = checkpoints(folder)
    for path in reversed(found):
        content, damaged = _content(path), STATE
        if content:
            damaged = next((name for name, check in content["files"].items() if not _is(path / name, check)), "")
        if damaged or not content:
            say(f"[yellow]warning[/] {path / damaged} is not as it was written: this checkpoint is left out")
            continue
        _check_identity(path, content["identity"], identity)
        return path, content["state"], load_file(path / OPTIMIZER)
    if found:
        raise CheckpointError(
            "every checkpoint is damaged",
            where=str(folder),
            fix="check the disk; --no-resume removes the checkpoints and restarts the training",
        )
    return None


def _content(path: Path) -> _Content | None:
    try:
        found = CONTENT.validate_python(unseal((path / STATE).read_bytes().removesuffix(b"\n")))
    except (OSError, ValidationError):
        return None
    return found if OPTIMIZER in found["files"] else None


def _is(path: Path, check: str) -> bool:
    try:
        return digest(path) == check
    except OSError:
        return False


def _check_identity(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, value in wanted.items():
        if found.get(name) != value:
            raise CheckpointError(
                f"the run in the output folder has another {name}: {found.get(name)}, now {value}",
                where=f"{path}/{STATE}, '{name}'",
                fix="choose another --output, or restart there with --no-resume",
            )
