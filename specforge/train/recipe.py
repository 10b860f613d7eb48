"""What `auto` stands for: packs, batch size, learning rates and warm-up, from the data, the target and the optimizer.

The constants come from a sweep on a target with hidden size 576 (docs/training.md has its table). That the best
learning rate falls with the square root of the number of optimizer steps is what the sweep shows; that it falls with
the width of the target is the maximal-update rule for hidden matrices (Yang et al., 2022), not measured here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from specforge.config import TrainSettings

UPDATES = 300  # optimizer steps that a run should have at least
FEWEST, MOST = 512, 16384  # tokens in an optimizer step
PACK = 2048  # tokens of a pack, if an optimizer step has so many
WIDTH = 576  # hidden size of the target of the sweep
MUON_RATE, MUON_PEAK = 0.16, 2e-2  # learning rate times sqrt(optimizer steps) at WIDTH, and the highest
ADAM_RATE, ADAM_PEAK = 0.04, 2e-3
LONG = 10_000  # optimizer steps beyond which rates fall no further: there AdamW's is the 5e-5 that EAGLE-3 gives for 8B
WARMUP, WARMUP_UPDATES = 0.03, 5  # share of the optimizer steps, and the fewest of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The optimizer and its settings; nothing is `auto`."""

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
    """(recipe, one line for each choice with its reason) for a data set of `tokens` tokens and a target of that hidden
    size. `before` is the recipe of the run that is resumed: its choices stay, whatever the number of ranks."""
    seen = tokens * settings.epochs
    aim = min(max(seen // UPDATES, FEWEST), MOST)
    pack = _given(settings, "row_tokens", before) or min(PACK, aim)
    batch = _given(settings, "batch_size", before) or -(-max(1, round(aim / pack)) // world) * world
    updates = max(1, round(seen / (pack * batch)))
    narrow, root = WIDTH / hidden_size, math.sqrt(min(updates, LONG))
    adam = min(ADAM_RATE / root, ADAM_PEAK) * narrow
    muon = min(MUON_RATE / root, MUON_PEAK) * narrow
    rate = muon if settings.optimizer == "muon" else adam
    warmup = _given(settings, "warmup_share", before)
    recipe = Recipe(
        optimizer=settings.optimizer,
        lr=_given(settings, "lr", before) or _rounded(rate),
        adam_lr=_given(settings, "adam_lr", before) or _rounded(adam),
        row_tokens=pack,
        batch_size=batch,
        warmup_share=min(0.5, max(WARMUP, WARMUP_UPDATES / updates)) if warmup is None else warmup,
    )
    return recipe, _reasons(settings, recipe, seen, hidden_size, updates, resumed=before is not None)


def _given(settings: TrainSettings, name: str, before: Mapping[str, Any] | None) -> Any:
    """What the user or the resumed run says; None if it is still to be chosen."""
    value = getattr(settings, name)
    return value if value != "auto" else (before or {}).get(name)


def _rounded(rate: float) -> float:
    """To two digits: what is printed is what is used."""
    return float(f"{rate:.1e}")


def _reasons(
    settings: TrainSettings, recipe: Recipe, seen: int, hidden_size: int, updates: int, resumed: bool
) -> list[str]:
    chosen = [
        name for name in ("row_tokens", "batch_size", "lr", "adam_lr", "warmup_share") if _is_auto(settings, name)
    ]
    if not chosen:
        return []
    if resumed:
        return ["auto: as the run that is resumed"]
    flags = {name: f"--{name.replace('_', '-')} {_shown(getattr(recipe, name))}" for name in chosen}
    found = []
    if sizes := [flags[name] for name in ("row_tokens", "batch_size") if name in flags]:
        why = f"{seen:,} tokens in {settings.epochs} epochs make {updates:,} optimizer steps"
        found.append(f"auto: {' '.join(sizes)} ({why}; aim: {UPDATES}, of {FEWEST:,} to {MOST:,} tokens)")
    if rates := [flags[name] for name in ("lr", "adam_lr") if name in flags and _counts(recipe, name)]:
        why = f"{recipe.optimizer}, {updates:,} steps, hidden size {hidden_size:,}"
        found.append(f"auto: {' '.join(rates)} ({why}; docs/training.md has the rule)")
    if "warmup_share" in flags:
        found.append(f"auto: {flags['warmup_share']} ({max(1, round(updates * recipe.warmup_share))} steps)")
    return found


def _shown(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.2g}"


def _is_auto(settings: TrainSettings, name: str) -> bool:
    return getattr(settings, name) == "auto"


def _counts(recipe: Recipe, name: str) -> bool:
    """AdamW alone has one learning rate."""
    return name == "lr" or recipe.optimizer == "muon"
