"""The settings that depend on the data and the target: what `auto` stands for, and why.

The constants come from a sweep on a target of 135 M parameters (docs/training.md, benchmarks/LOG.md); how they carry
over to larger targets is from the literature and was not measured here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from specforge.config import TrainSettings

UPDATES = 600  # optimizer steps that a run should have
SMALLEST, LARGEST = 512, 16384  # tokens in an optimizer step
PACK = 2048  # tokens of a packed row, where an optimizer step has so many
WIDTH = 576  # hidden size of the target of the sweep
RATES = {"muon": 1e-2, "adamw": 2e-3}
HEAD_RATE = 2e-3
WARMUP_UPDATES, WARMUP_SHARE = 10, 0.03


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The optimizer and its settings, every `auto` resolved."""

    optimizer: str
    lr: float  # peak; with muon of the matrices
    adam_lr: float  # with muon: peak of head and norms
    row_tokens: int
    batch_size: int  # packed rows in an optimizer step, over all ranks
    warmup_share: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def choose(
    settings: TrainSettings, tokens: int, hidden_size: int, world: int, before: Mapping[str, Any] | None = None
) -> tuple[Recipe, list[str]]:
    """(recipe, a line for each choice, with its reason), for a data set of `tokens` tokens and a target of that hidden
    size. `before` is the recipe of the run that is resumed: what was chosen then stays."""
    name = settings.optimizer
    reasons: list[str] = []

    def chosen(field: str, value: Any, why: str) -> Any:
        given = getattr(settings, field)
        if given != "auto":
            return given
        if before and field in before:
            reasons.append(f"auto: --{field.replace('_', '-')} {before[field]:g}, as in the run that is resumed")
            return before[field]
        reasons.append(f"auto: --{field.replace('_', '-')} {value:g}: {why}")
        return value

    seen = tokens * settings.epochs
    aim = min(max(seen // UPDATES, SMALLEST), LARGEST)
    why = f"{seen:,} tokens in {settings.epochs} epochs, aim: {UPDATES:,} steps of {SMALLEST:,} to {LARGEST:,} tokens"
    row_tokens = chosen("row_tokens", min(PACK, aim), why)
    packs = max(1, round(aim / row_tokens))
    batch_size = chosen("batch_size", -(-packs // world) * world, f"{why}; {world} ranks")
    updates = seen / (row_tokens * batch_size)
    lr = chosen("lr", RATES[name] * WIDTH / hidden_size, name)
    adam_lr = chosen("adam_lr", HEAD_RATE * WIDTH / hidden_size, "") if name == "muon" else lr
    warmup_share = chosen("warmup_share", max(WARMUP_SHARE, min(0.1, WARMUP_UPDATES / updates)), "")
    recipe = Recipe(
        optimizer=name, lr=lr, adam_lr=adam_lr, row_tokens=row_tokens, batch_size=batch_size, warmup_share=warmup_share
    )
    return recipe, reasons
