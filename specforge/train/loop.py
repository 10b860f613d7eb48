"""The training loop: packed rows in, a draft out. One function can be read whole; side work stands around it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from specforge.config import TrainSettings
from specforge.console import advance, is_main_rank, progress, say
from specforge.draft import folder as draft_folder
from specforge.draft.step import DraftStep, StepResult
from specforge.files import replacing
from specforge.records import Acceptance, FeatureBatch, FeatureRecord, Ranks, RecordSource
from specforge.train import checkpoint
from specforge.train.checkpoint import RunState
from specforge.train.optimizer import DraftOptimizer, learning_rate

Slots = list[list[list[Sequence[int]]]]  # [optimizer step][slot][rank] -> record indices of a packed row


@dataclass(kw_only=True)
class Run:
    """What the loop needs, made by the pipeline."""

    settings: TrainSettings
    ranks: Ranks
    step: DraftStep
    optimizer: DraftOptimizer
    source: RecordSource
    plan: Callable[[int], Slots]  # epoch -> the rows of every rank
    evaluate: Callable[[], Acceptance]  # on held-out records; collective
    identity: dict[str, Any]  # what a resumed run must share
    dtype: torch.dtype
    state: RunState = field(default_factory=RunState)

    @property
    def output(self) -> Path:
        return self.settings.output


def train(run: Run) -> None:
    """All epochs from where `run.state` is."""
    settings, state = run.settings, run.state
    total = len(run.plan(0)) * settings.epochs  # other epochs may pack into a row more or less
    _trim_log(run)
    if state.updates == 0:
        untrained = run.evaluate()
        _log(run, {"epoch": 0, "held_out": untrained.as_json()})
        say(f"untrained  held-out acceptance length {untrained.length:.3f}")
    while state.epoch < settings.epochs:
        steps = run.plan(state.epoch)[state.step_in_epoch :]
        own_slots = [[run.ranks.of_replica(slot) for slot in slots] for slots in steps]
        records = run.source.batches([slot for slots in own_slots for slot in slots])
        with progress(f"epoch {state.epoch + 1}/{settings.epochs}", len(steps), "steps") as bar:
            for slots in steps:
                began = time.perf_counter()
                batches = [_packed(run, found) for found in islice(records, len(slots))]
                row = _update(run, batches, total, began)
                _log(run, row)
                advance(bar, 1, f"loss {row['loss']:.3f}  {row['tokens_per_second']:,.0f} tokens/s")
                if state.updates % settings.save_steps == 0:
                    _save(run)
        state.epoch, state.step_in_epoch = state.epoch + 1, 0
        acceptance = run.evaluate()
        better = acceptance.length > state.best_length
        if better:
            state.best_length, state.best_epoch = acceptance.length, state.epoch
        _log(run, {"epoch": state.epoch, "held_out": acceptance.as_json()})
        say(
            f"epoch {state.epoch:>3}  held-out acceptance length {acceptance.length:.3f} "
            f"(walk {acceptance.walk_length:.3f})  per position "
            + " ".join(f"{share:.2f}" for share in acceptance.share)
            + ("  [green]best[/]" if better else "")
        )
        _save(run, best=better)
    say(f"best: epoch {state.best_epoch}, held-out acceptance length {state.best_length:.3f}")


def _update(run: Run, batches: list[FeatureBatch | None], total: int, began: float) -> dict[str, Any]:
    """One optimizer step over this rank's packed rows."""
    settings, state = run.settings, run.state
    run.step.train()
    normaliser = torch.stack([run.step.loss_rows(b) for b in batches if b] or [run.step.no_rows()]).sum(0)
    dist.all_reduce(normaliser)
    rate = learning_rate(state.updates, total, settings.lr, settings.warmup_share)
    run.optimizer.set_learning_rate(rate)
    results = [run.optimizer.accumulate(batch, normaliser) for batch in batches]
    state.updates += 1
    state.step_in_epoch += 1
    count = torch.tensor(sum(sum(batch.lengths) for batch in batches if batch), device=normaliser.device)
    dist.all_reduce(count)
    tokens = int(count)
    return _measure(results, normaliser, tokens, run) | {
        "step": state.updates,
        "epoch": state.epoch,
        "lr": rate,
        "grad_norm": run.optimizer.gradient_norm(),
        "tokens_per_second": tokens / (time.perf_counter() - began),
    }


def _measure(results: list[StepResult], normaliser: Tensor, tokens: int, run: Run) -> dict[str, Any]:
    """Sums over ranks and rows, as numbers a person reads."""
    sums = torch.stack([sum(getattr(r, name) for r in results).double() for name in ("loss_sum", "hits", "rows")])
    dist.all_reduce(sums)
    loss_i = sums[0] / normaliser.clamp(min=1)
    weight_i = run.settings.step_decay ** torch.arange(run.settings.steps, device=sums.device)
    return {
        "loss": float((weight_i * loss_i).sum()),
        "loss_by_step": [round(value, 5) for value in loss_i.tolist()],
        "accuracy_by_step": [round(value, 5) for value in (sums[1] / sums[2].clamp(min=1)).tolist()],
        "coverage": float(normaliser[0] / sums[2][0].clamp(min=1)),
        "tokens": tokens,
    }


def _packed(run: Run, records: list[FeatureRecord]) -> FeatureBatch | None:
    return FeatureBatch.pack(records, run.ranks.device, run.dtype) if records else None


def _save(run: Run, best: bool = False) -> None:
    """A checkpoint, and the draft as `best` where it is. Collective; rank 0 writes."""
    settings, state = run.settings, run.state
    tensors = run.optimizer.state()
    if is_main_rank():
        folder, draft, kept_D = run.output / "checkpoints", run.step.draft, run.step.kept_D
        if best:
            weights = {name: tensors[name] for name in draft.state_dict()}
            draft_folder.save(run.output / "best", draft, kept_D, weights, run.dtype)
        checkpoint.save(folder, draft, kept_D, tensors, state, run.identity, run.dtype)
        checkpoint.keep_newest(folder, settings.keep)
    dist.barrier()


def _trim_log(run: Run) -> None:
    """A resumed run repeats the steps after its checkpoint: their old lines go."""
    path = run.output / "metrics.jsonl"
    if not is_main_rank() or not path.exists():
        return
    state = run.state
    rows = [
        json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line[-1:] == "\n"
    ]
    with replacing(path) as file:
        for row in rows if state.updates else []:
            if row["epoch"] <= state.epoch if "held_out" in row else row["step"] <= state.updates:
                file.write(json.dumps(row) + "\n")


def _log(run: Run, row: dict[str, Any]) -> None:
    if is_main_rank():
        with (run.output / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
