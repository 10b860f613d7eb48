"""The training loop: packed rows in, a draft out. One function can be read whole; side work stands around it."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
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
from specforge.errors import TrainingError
from specforge.files import parse_json, replacing
from specforge.records import Acceptance, FeatureBatch, FeatureRecord, Ranks, RecordSource, sent
from specforge.train import checkpoint
from specforge.train.checkpoint import RunState
from specforge.train.optimizer import DraftOptimizer, share_of_peak
from specforge.train.plain import PlainOptimizer
from specforge.train.recipe import Recipe
from specforge.train.timing import Clock, Sigterm
from specforge.train.tracker import Tracker

NORMS_KEPT, NORMS_NEEDED = 100, 20  # gradient norms that a spike is told by
SKIPS_ALLOWED = 3  # in a row
STEPS_UNCOVERED = 20  # in a row, without a token of the draft vocabulary
Slots = list[list[list[Sequence[int]]]]  # [optimizer step][slot][rank] -> record indices of a packed row


@dataclass(kw_only=True)
class Run:
    """What the loop needs, made by the pipeline."""

    settings: TrainSettings
    ranks: Ranks
    step: DraftStep
    optimizer: DraftOptimizer | PlainOptimizer
    recipe: Recipe
    source: RecordSource
    plan: Callable[[int], Slots]  # epoch -> the rows of every rank
    evaluate: Callable[[], Acceptance]  # on held-out records; collective
    identity: dict[str, Any]  # what a resumed run must share
    dtype: torch.dtype
    beat: Callable[[], None] = lambda: None  # called where long work has come on
    tracker: Tracker | None = None
    state: RunState = field(default_factory=RunState)

    @property
    def output(self) -> Path:
        return self.settings.output


def train(run: Run) -> bool:
    """All epochs from where `run.state` is. False where SIGTERM ended it early, after a checkpoint."""
    settings, state = run.settings, run.state
    total = len(run.plan(0)) * settings.epochs  # other epochs may pack into a row more or less
    _trim_log(run)
    if state.updates == 0:
        untrained = _evaluated(run)
        _log(run, {"epoch": 0, "held_out": untrained.as_json()})
        say(f"untrained  held-out acceptance length {untrained.length:.3f}")
    uncovered = 0  # steps in a row
    with Sigterm() as stop:
        while state.epoch < settings.epochs:
            steps = run.plan(state.epoch)[state.step_in_epoch :]
            own_slots = [[run.ranks.of_replica(slot) for slot in slots] for slots in steps]
            records = run.source.batches([slot for slots in own_slots for slot in slots])
            with progress(f"epoch {state.epoch + 1}/{settings.epochs}", len(steps), "steps") as bar:
                clock = Clock()
                batches = _fetch(run, records, clock)
                for _ in steps:
                    row, batches = _update(run, batches, total, stop.asked, partial(_fetch, run, records, clock))
                    _log(run, row | clock.rates(row))
                    uncovered = 0 if row["coverage"] else uncovered + 1
                    _check_coverage(run, uncovered)
                    advance(bar, 1, f"loss {row['loss']:.3f}  {row['tokens'] / clock.seconds:,.0f} tokens/s")
                    if state.updates % settings.save_steps == 0 or row["stop"]:
                        _save(run)
                    clock = Clock()
                    if row["stop"]:
                        say(f"stopped by SIGTERM after step {state.updates}; the same command goes on from there")
                        return False
            state.epoch, state.step_in_epoch = state.epoch + 1, 0
            _end_of_epoch(run)
            if settings.patience and state.epoch - state.best_epoch >= settings.patience:
                say(f"no longer simulated decoding for {settings.patience} epochs: stopped early")
                break
    say(f"best: epoch {state.best_epoch}, simulated decoding length {state.best_length:.3f} on held-out text")
    return True


def _check_coverage(run: Run, uncovered: int) -> None:
    """A step of small rows may hold no token of the draft vocabulary; many in a row mean that nothing is learned."""
    if uncovered >= STEPS_UNCOVERED:
        raise TrainingError(
            f"in {uncovered} steps no token that the target would say is in the draft vocabulary: nothing is learned",
            where=f"step {run.state.updates}; 'coverage' in {run.output}/metrics.jsonl",
            fix="raise --draft-vocab-size; if it is large, look for what the target makes of these conversations",
        )


Batches = list[FeatureBatch | None]  # this rank's packed rows of an optimizer step


def _fetch(run: Run, records: Iterator[list[FeatureRecord]], clock: Clock) -> Batches:
    """The next optimizer step's rows; none after the epoch's last."""
    rows = run.recipe.batch_size // run.ranks.world
    found = clock.timed(run.source.kind, lambda: list(islice(records, rows)))
    return clock.timed("data", lambda: [_packed(run, one) for one in found])


def _update(
    run: Run, batches: Batches, total: int, stop: bool, fetch: Callable[[], Batches]
) -> tuple[dict[str, Any], Batches]:
    """One optimizer step, and the next one's rows: they are captured or read while the device is at the backward."""
    settings, state = run.settings, run.state
    run.step.train()
    run.step.unrolled = unrolled_steps(state.updates, total, settings.steps, settings.ttt_growth)
    normaliser = torch.stack([run.step.loss_rows(b) for b in batches if b] or [run.step.no_rows()]).sum(0)
    normaliser = sent(normaliser, run.ranks.device)
    dist.all_reduce(normaliser)
    results = run.optimizer.accumulate(batches, normaliser)
    following = fetch()
    share = share_of_peak(state.updates, total, run.recipe.warmup_share, settings.schedule)
    done = run.optimizer.update(share, _sums(results, batches, normaliser, stop), _longest_norm(run))
    state.updates += 1
    state.step_in_epoch += 1
    row = _readable(done.sums, settings, run.step.unrolled)
    row |= {
        "unrolled": run.step.unrolled,
        "step": state.updates,
        "epoch": state.epoch,
        "lr": share * run.recipe.lr,
        "grad_norm": done.norm,
        "applied": done.applied,
    }
    if done.applied:
        state.applied, state.skipped_in_a_row = state.applied + 1, 0
        state.norms = [*state.norms[1 - NORMS_KEPT :], done.norm]
    else:
        _skipped(run, row)
    return row, following


def unrolled_steps(update: int, total: int, steps: int, growth: float) -> int:
    """The TTT length of an optimizer step: from 1 to `steps`, evenly over the first share `growth` of the run. Early on
    serving would hardly reach the later steps, and they cost as much as the first."""
    return steps if update >= growth * total else 1 + int(update / (growth * total) * steps)


def _longest_norm(run: Run) -> float:
    """A gradient that is longer is a spike. Unknown until there is something to compare with."""
    norms = run.state.norms
    return run.settings.max_spike * statistics.median(norms) if len(norms) >= NORMS_NEEDED else math.inf


def _skipped(run: Run, row: dict[str, Any]) -> None:
    """Three in a row are no accident of the data: back to the last checkpoint, and on with the data that follows. Once.
    Raises TrainingError at the second time."""
    state = run.state
    state.skipped_in_a_row += 1
    say(f"[yellow]step {state.updates} skipped[/]: loss {row['loss']:.3g}, gradient norm {row['grad_norm']:.3g}")
    if state.skipped_in_a_row < SKIPS_ALLOWED:
        return
    found = None if state.went_back else checkpoint.load_newest(run.output / "checkpoints", run.identity)
    if found is None:
        raise TrainingError(
            f"{SKIPS_ALLOWED} steps in a row had a loss or gradient that is not finite, or a gradient "
            f"{run.settings.max_spike:g} times as long as usual"
            + (", again after going back to a checkpoint" if state.went_back else ""),
            where=f"step {state.updates}, epoch {state.epoch + 1}; {run.output}/metrics.jsonl",
            fix="lower --lr; if the loss is not finite, look for what the target makes of these conversations",
        )
    path, before, tensors = found
    run.optimizer.load_state(tensors, before.applied)
    state.applied, state.norms, state.skipped_in_a_row, state.went_back = before.applied, before.norms, 0, True
    say(f"[yellow]{SKIPS_ALLOWED} steps in a row skipped[/]: weights of {path.name}, data goes on")


def _evaluated(run: Run) -> Acceptance:
    with run.optimizer.whole():
        return run.evaluate()


def _end_of_epoch(run: Run) -> None:
    state = run.state
    acceptance = _evaluated(run)
    better = acceptance.walk_length > state.best_length
    if better:
        state.best_length, state.best_epoch = acceptance.walk_length, state.epoch
    _log(run, {"epoch": state.epoch, "held_out": acceptance.as_json()})
    say(
        f"epoch {state.epoch:>3}  held-out acceptance length {acceptance.length:.3f} "
        f"(simulated decoding {acceptance.walk_length:.3f})  per position "
        + " ".join(f"{share:.2f}" for share in acceptance.share)
        + ("  [green]best[/]" if better else "")
    )
    _save(run, best=better)


def _sums(results: Sequence[StepResult], batches: Batches, normaliser: Tensor, stop: bool) -> Tensor:
    """Over ranks and rows, on the device: what `_readable` takes apart."""
    tokens = sum(sum(batch.lengths) for batch in batches if batch)
    supervised = sum(len(batch.last) for batch in batches if batch)
    device, rows_i = normaliser.device, torch.stack([result.rows for result in results]).sum(0)
    known_here = sent(torch.tensor([tokens, supervised, stop, *rows_i.tolist()], dtype=torch.float64), device)
    per_step = [torch.stack([getattr(r, name) for r in results]).double().sum(0) for name in ("loss_sum", "hits")]
    sums = torch.cat([known_here, *per_step])
    dist.all_reduce(sums)
    return torch.cat([sums, normaliser.double()])


def _readable(sums: list[float], settings: TrainSettings, unrolled: int) -> dict[str, Any]:
    """As numbers that a person reads. The loss is the weighted mean over the unrolled steps, nats."""
    tokens, supervised, stops, *found = sums
    steps = settings.steps
    rows, losses, hits, counts = (found[at : at + steps] for at in range(0, 4 * steps, steps))
    loss_i = [loss / max(count, 1) for loss, count in zip(losses, counts, strict=True)]
    accuracy_i = [hit / max(count, 1) for hit, count in zip(hits, rows, strict=True)]
    weight_i = [settings.step_decay**i for i in range(unrolled)]
    return {
        "loss": sum(weight * loss for weight, loss in zip(weight_i, loss_i, strict=False)) / sum(weight_i),
        "loss_by_step": [round(loss, 5) for loss in loss_i[:unrolled]],
        "accuracy_by_step": [round(accuracy, 5) for accuracy in accuracy_i[:unrolled]],
        "expected_length": 1 + sum(math.prod(accuracy_i[: i + 1]) for i in range(steps)),
        "coverage": counts[0] / max(rows[0], 1),
        "tokens": int(tokens),
        "supervised_tokens": int(supervised),  # but each turn's first, which nothing predicts
        "stop": stops > 0,
    }


def _packed(run: Run, records: list[FeatureRecord]) -> FeatureBatch | None:
    return FeatureBatch.pack(records, run.ranks.device, run.dtype) if records else None


def _save(run: Run, best: bool = False) -> None:
    """A checkpoint, and the draft as `best` where it is. Collective; rank 0 writes."""
    settings, state = run.settings, run.state
    tensors = run.optimizer.state()  # on rank 0
    run.beat()
    if is_main_rank():
        folder, draft, kept_D = run.output / "checkpoints", run.step.draft, run.step.kept_D
        if best:
            weights = {name: tensors[name] for name in draft.state_dict()}
            with checkpoint.writing(run.output / ".best.tmp"):
                draft_folder.save(run.output / "best", draft, kept_D, weights, run.dtype)
            run.beat()
        checkpoint.save(folder, draft, kept_D, tensors, state, run.identity, run.dtype)
        checkpoint.keep_newest(folder, settings.keep)
    dist.barrier()


def _trim_log(run: Run) -> None:
    """A resumed run repeats the steps after its checkpoint: their old lines go."""
    path = run.output / "metrics.jsonl"
    if not is_main_rank() or not path.exists():
        return
    state = run.state
    *lines, _ = path.read_bytes().split(b"\n")
    with replacing(path) as file:
        for number, line in enumerate(lines if state.updates else [], 1):
            try:
                row, text = parse_json(line), line.decode()
                done = row["epoch"] <= state.epoch if "held_out" in row else row["step"] <= state.updates
            except (ValueError, KeyError, TypeError) as error:
                raise TrainingError(
                    "a line of the log is damaged",
                    where=f"{path}, line {number}",
                    fix="delete that line and start again: the run needs the log for its report only",
                ) from error
            if done:
                file.write(text + "\n")


def _log(run: Run, row: dict[str, Any]) -> None:
    """JSON knows no NaN: null stands for it."""
    if is_main_rank():
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        if "held_out" not in row and not row["applied"]:
            row["loss_by_step"] = None
        with (run.output / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if run.tracker:
            run.tracker.write(row, run.state.updates)
