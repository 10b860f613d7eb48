"""What a choice in training is worth: held-out acceptance length of drafts that differ in one thing, over seeds.

    python benchmarks/recipes.py FEATURES --model-path TARGET --runs compare [--jobs 1] [--output FILE]

FEATURES is a folder that `specforge prepare-hidden` wrote (the demo's: runs/demo/features). `--runs` names a set of
recipes below: `compare` holds the default recipe against the eager one, each at several learning rates; `sweep` varies
learning rate, tokens a step and amount of data for both optimizers; `extras` tries what else may help. All train in
plain torch (train/plain.py) in bf16 from the same start, and the learning rate falls to zero within each.

The eager recipe is the usual one: padded batches of 8 conversations in random order, the loss divided by the padded
area, AdamW (its gradient is that of tests/eager_reference.py; only its speed is ours)."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specforge import launch
from specforge.data import vocab
from specforge.draft.model import DraftConfig, Eagle3Draft
from specforge.draft.step import DraftStep
from specforge.evaluate.acceptance import teacher_forced
from specforge.features.packing import pack_rows
from specforge.features.store import Store
from specforge.records import FeatureBatch, FeatureRecord
from specforge.target import weights
from specforge.train import muon
from specforge.train.loop import unrolled_steps
from specforge.train.optimizer import NAMES, share_of_peak
from specforge.train.plain import PlainOptimizer

BATCH = 8  # conversations of the eager recipe
STEPS = 7  # TTT steps


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run. Names of recipes are made of what differs from these defaults."""

    growth: float = 0.75  # share of the run in which the TTT length grows from 1 to 7
    optimizer: str = "muon"
    lr: float = 1e-2
    adam_lr: float = 2e-3  # of the head and the norms, with muon
    epochs: float = 2  # passes over the data; half a pass is its first half
    pack: int = 512  # tokens of a packed row
    batch: int = 1  # packed rows in an optimizer step
    warmup: float = 0.03
    loss: str = "kl"
    decay: float = 0.8
    padded: bool = False  # the eager recipe's batches and loss
    weight_decay: float = 0.0
    momentum: float = 0.95
    clip: float = 0.5
    muon_head: bool = False
    reach: bool = False  # step weights: the chance that serving reaches the step, from the last updates' accuracy
    lk_last: float = 0.0  # the last share of the steps with the loss `lk`
    ema: float = 0.0  # evaluate an average of the weights, with this decay
    schedule: str = "cosine"
    norms: dict[str, bool] = field(default_factory=dict)

    @property
    def name(self) -> str:
        plain = Recipe()
        changed = [f for f in fields(Recipe) if getattr(self, f.name) != getattr(plain, f.name)]
        return ", ".join(f"{f.name} {getattr(self, f.name)}" for f in changed) or "default"


def compare() -> list[Recipe]:
    """The default recipe, also without growth, with all and with half the tokens; and the eager recipe."""
    ours = [Recipe(lr=lr, epochs=n, growth=g) for g in (0.75, 0.0) for n in (2, 1) for lr in (5e-3, 1e-2, 2e-2)]
    eager = [Recipe(optimizer="adamw", padded=True, growth=0.0, lr=lr) for lr in (1e-3, 2e-3, 4e-3, 8e-3)]
    return ours + eager


def sweep() -> list[Recipe]:
    """Each optimizer over learning rate, tokens a step, and amount of data."""
    small, usual = ((256, 1), (1024, 4)), ((512, 1), (1024, 1), (1024, 2))
    plan = [
        ("muon", 1, usual + small, (2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2)),
        ("adamw", 1, usual, (1e-3, 2e-3, 4e-3, 8e-3)),
        ("muon", 2, usual, (5e-3, 1e-2, 2e-2)),
        ("adamw", 2, usual, (1e-3, 2e-3, 4e-3)),
    ]
    return [
        Recipe(growth=0.0, optimizer=optimizer, lr=lr, epochs=epochs, pack=pack, batch=batch)
        for optimizer, epochs, packs, rates in plan
        for pack, batch in packs
        for lr in rates
    ]


def extras() -> list[Recipe]:
    one = Recipe(growth=0.0)
    return [
        one,
        replace(one, decay=0.6),
        replace(one, decay=1.0),
        replace(one, reach=True),
        replace(one, lk_last=0.2),
        replace(one, lk_last=0.5),
        replace(one, norms={"fc_norm": True, "norm_output": True}),
        replace(one, norms={"fc_norm": True}),
        replace(one, ema=0.98),
        replace(one, schedule="constant", ema=0.98),
        replace(one, muon_head=True),
        replace(one, weight_decay=0.1),
        *(replace(one, growth=growth) for growth in (0.5, 0.75, 1.0)),
        replace(one, adam_lr=1e-3),
        replace(one, adam_lr=4e-3),
        replace(one, momentum=0.9),
        replace(one, clip=1e9),
        replace(one, warmup=0.1),
    ]


RUNS = {"compare": compare, "sweep": sweep, "extras": extras}


class Bench:
    """What all runs share."""

    def __init__(self, features: Path, model_path: str, draft_vocab_size: int, test: Path | None = None) -> None:
        self.ranks = launch.join(1)
        stores = {"train": Store(features / "train", "never"), "test": Store(test or features / "test", "never")}
        self.aux_layers = stores["train"].manifest.aux_layers
        self.records = {
            name: [self.on_device(store.record(at)) for at in range(len(store.lengths))]
            for name, store in stores.items()
        }
        self.lengths = {name: store.lengths for name, store in stores.items()}
        self.info = weights.describe(model_path)
        self.head = weights.load_head(self.info, torch.bfloat16)
        counts_V = vocab.count_supervised(stores["train"].tokens_and_masks(), self.info.vocab_size)
        self.kept_D = torch.from_numpy(vocab.choose(counts_V, draft_vocab_size, []))

    def on_device(self, record: FeatureRecord) -> FeatureRecord:
        if self.ranks.device.type == "cpu":
            return record
        moved = {name: getattr(record, name).to(self.ranks.device) for name in ("aux", "last", "teacher_lse")}
        return replace(record, **moved)

    def pack(self, split: str, row: list[int]) -> FeatureBatch:
        return FeatureBatch.pack([self.records[split][at] for at in row], self.ranks.device, torch.bfloat16)

    def rows(self, recipe: Recipe, seed: int, epoch: int) -> list[list[list[int]]]:
        """[optimizer step][row]"""
        lengths = self.lengths["train"]
        if recipe.padded:
            order = np.random.default_rng([seed, epoch]).permutation(len(lengths)).tolist()
            return [[order[at : at + BATCH]] for at in range(0, len(order), BATCH)]
        rows = pack_rows(lengths, recipe.pack, seed, epoch)
        return [rows[at : at + recipe.batch] for at in range(0, len(rows), recipe.batch)]

    def plan(self, recipe: Recipe, seed: int) -> list[list[list[int]]]:
        whole, rest = divmod(recipe.epochs, 1)
        steps = [rows for epoch in range(int(whole)) for rows in self.rows(recipe, seed, epoch)]
        last = self.rows(recipe, seed, int(whole))
        return steps + last[: round(rest * len(last))]

    def train(self, recipe: Recipe, seed: int) -> dict[str, Any]:
        device = self.ranks.device
        draft = Eagle3Draft(DraftConfig.for_target(self.info, self.aux_layers, len(self.kept_D), **recipe.norms))
        draft.initialise(self.head, self.kept_D, seed)
        head, kept_D = self.head.to(device), self.kept_D.to(device)
        step = DraftStep(draft.to(device), head, kept_D, STEPS, recipe.decay, recipe.loss)
        parameters = {"lr": recipe.lr, "adam_lr": recipe.adam_lr, "betas": [0.9, 0.95]}
        config = {
            "bf16": {"enabled": True},
            "gradient_clipping": recipe.clip,
            "optimizer": {
                "type": NAMES[recipe.optimizer],
                "params": parameters | {"weight_decay": recipe.weight_decay},
            },
        }
        muon.MOMENTUM, muon.HEAD = recipe.momentum, "none" if recipe.muon_head else "lm_head.weight"
        optimizer = PlainOptimizer(step, config, self.ranks)
        steps = self.plan(recipe, seed)
        average: dict[str, Tensor] = {}
        accuracy_i = torch.zeros(STEPS, dtype=torch.float64)
        began, tokens = time.perf_counter(), 0
        for number, rows in enumerate(steps):
            batches = [self.pack("train", row) for row in rows]
            if recipe.padded:
                lengths = [length for batch in batches for length in batch.lengths]
                denominator = torch.full((STEPS,), len(lengths) * max(lengths))
            else:
                denominator = torch.stack([step.loss_rows(batch) for batch in batches]).sum(0)
            step.loss = "lk" if number >= (1 - recipe.lk_last) * len(steps) else recipe.loss
            step.unrolled = unrolled_steps(number, len(steps), STEPS, recipe.growth)
            results = optimizer.accumulate(batches, denominator)
            if recipe.reach:
                hits_i = sum(result.hits for result in results).cpu() / sum(r.rows for r in results).clamp(min=1)
                accuracy_i = accuracy_i.lerp(hits_i.double(), 0.1)
                step.weight_i = torch.cat([torch.ones(1), accuracy_i[:-1].cumprod(0)]).double()
            optimizer.update(
                share_of_peak(number, len(steps), recipe.warmup, recipe.schedule), torch.zeros(1, device=device), 1e30
            )
            for name, weight in optimizer._weights.items() if recipe.ema else ():
                average.setdefault(name, weight.clone()).lerp_(weight, 1 - recipe.ema)
            tokens += sum(sum(batch.lengths) for batch in batches)
        if recipe.ema:
            draft.load_state_dict(average, strict=False)
        seconds = time.perf_counter() - began
        found = teacher_forced(draft, step.embedding_VH, kept_D, self.held_out(), STEPS)
        return {
            "length": found.length,
            "decoding_length": found.walk_length,
            "share": [round(share, 4) for share in found.share],
            "tokens": tokens,
            "steps": len(steps),
            "seconds": seconds,
        }

    def held_out(self) -> Iterator[FeatureBatch]:
        for row in pack_rows(self.lengths["test"], 1024, seed=0, epoch=0):
            yield self.pack("test", list(row))


_bench: Bench  # of a worker process


def _start(*arguments: Any) -> None:
    global _bench
    if not torch.cuda.is_available() and int(os.environ.get("OMP_NUM_THREADS", 0)):
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    _bench = Bench(*arguments)


def _run(task: tuple[Recipe, int, float]) -> tuple[Recipe, int, dict[str, Any] | None]:
    recipe, seed, until = task
    return recipe, seed, _bench.train(recipe, seed) if time.monotonic() < until else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("features", type=Path)
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--test", type=Path, help="a store of held-out records, in place of FEATURES/test")
    parser.add_argument("--runs", choices=sorted(RUNS), default="compare")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--match", default="", help="only recipes whose name contains this")
    parser.add_argument("--limit", type=int, help="only so many recipes, for a try")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no run after so long")
    parser.add_argument("--draft-vocab-size", type=int, default=8192)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each in a process of its own")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    results: dict[str, Any] = {}
    if options.output and options.output.exists():
        results = json.loads(options.output.read_text(encoding="utf-8"))["recipes"]
    recipes = [recipe for recipe in RUNS[options.runs]() if options.match in recipe.name][: options.limit]
    waiting = [(recipe, seed) for seed in options.seeds for recipe in recipes]
    waiting = [(r, seed) for r, seed in waiting if str(seed) not in results.get(r.name, {"runs": {}})["runs"]]
    shared = (options.features, options.model_path, options.draft_vocab_size, options.test)
    until = time.monotonic() + 60 * options.minutes
    context = multiprocessing.get_context("spawn")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    with context.Pool(options.jobs, _start, shared) as pool:
        for recipe, seed, found in pool.imap_unordered(_run, [(*task, until) for task in waiting]):
            if found is None:
                continue
            done = results.setdefault(recipe.name, {"runs": {}})
            done["runs"][str(seed)] = found
            lengths = [run["length"] for run in done["runs"].values()]
            done["median"], done["spread"] = statistics.median(lengths), max(lengths) - min(lengths)
            print(f"{recipe.name}, seed {seed}:", json.dumps(found), flush=True)
            if options.output:
                content = {"date": time.strftime("%Y-%m-%d"), "device": device, "recipes": results}
                options.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
