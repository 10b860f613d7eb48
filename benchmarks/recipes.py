"""What a choice in training is worth: held-out acceptance length of drafts that differ in one thing, over seeds.

    python benchmarks/recipes.py FEATURES --model-path TARGET [--fp8 FEATURES] [--only NAME ...] [--output FILE]

FEATURES is a folder that `specforge prepare-hidden` wrote (the demo's: runs/demo/features). All runs see as many
tokens, in plain torch (train/plain.py), from the same start; the learning rate falls to zero within each. `eager
recipe` is the usual one: padded batches of 8 conversations in random order, the loss divided by the padded area (its
gradient is that of tests/eager_reference.py; only its speed is ours). `fp8` reads the features of --fp8."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from specforge import launch
from specforge.data import vocab
from specforge.draft.model import DraftConfig, Eagle3Draft
from specforge.draft.step import DraftStep
from specforge.evaluate.acceptance import teacher_forced
from specforge.features.packing import pack_rows
from specforge.features.store import Store
from specforge.records import FeatureBatch
from specforge.target import weights
from specforge.train.optimizer import learning_rate
from specforge.train.plain import PlainOptimizer

BATCH = 8  # conversations of the eager recipe
SEEDS = (0, 1, 2)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The demo's, but for what is named."""

    lr: float = 2e-3
    epochs: int = 2
    row_tokens: int = 1024
    rows_per_step: int = 1
    loss: str = "kl"
    padded: bool = False
    chance: bool = False  # rows filled one after the other in random order
    one_count: bool = False  # every step's loss divided by step 0's rows, not by its own
    fp8: bool = False
    norms: dict[str, bool] = field(default_factory=dict)


RECIPES = {
    "ours": Recipe(),
    "eager recipe": Recipe(padded=True),
    "ours, as many steps": Recipe(row_tokens=960),  # as the eager recipe: 156
    "fp8": Recipe(fp8=True),
    "eagle3.1": Recipe(norms={"fc_norm": True, "norm_output": True}),
    "lk": Recipe(loss="lk"),
    "next fit": Recipe(chance=True),
    "2 rows a step": Recipe(rows_per_step=2),  # about as many tokens a step as 8 conversations
    "2 rows a step, one count": Recipe(rows_per_step=2, one_count=True),
    "lr 1e-3": Recipe(lr=1e-3),
    "lr 4e-3": Recipe(lr=4e-3),
    "rows of 512": Recipe(row_tokens=512),
    "rows of 512, lr 1e-3": Recipe(row_tokens=512, lr=1e-3),
    "4 rows a step": Recipe(rows_per_step=4),
    "4 rows a step, lr 4e-3": Recipe(rows_per_step=4, lr=4e-3),
    "1 epoch": Recipe(epochs=1),
    "4 epochs": Recipe(epochs=4),
}


class Bench:
    """What all runs share."""

    def __init__(self, features: Path, model_path: str, draft_vocab_size: int) -> None:
        self.ranks = launch.join(1)
        self.stores = {split: Store(features / split, "never") for split in ("train", "test")}
        self.info = weights.describe(model_path)
        self.head = weights.load_head(self.info, torch.bfloat16)
        counts_V = vocab.count_supervised(self.stores["train"].tokens_and_masks(), self.info.vocab_size)
        self.kept_D = torch.from_numpy(vocab.choose(counts_V, draft_vocab_size, []))

    def pack(self, store: Store, row: list[int]) -> FeatureBatch:
        return FeatureBatch.pack([store.record(at) for at in row], self.ranks.device, torch.bfloat16)

    def rows(self, recipe: Recipe, seed: int, epoch: int) -> list[list[list[int]]]:
        """[optimizer step][row]"""
        lengths = self.stores["train"].lengths
        if recipe.padded:
            order = np.random.default_rng([seed, epoch]).permutation(len(lengths)).tolist()
            return [[order[at : at + BATCH]] for at in range(0, len(order), BATCH)]
        rows = pack_rows(lengths, recipe.row_tokens, seed, epoch)
        if recipe.chance:
            rows, room = [[]], recipe.row_tokens
            for record in np.random.default_rng([seed, epoch]).permutation(len(lengths)).tolist():
                if lengths[record] > room:
                    rows.append([])
                    room = recipe.row_tokens
                rows[-1].append(record)
                room -= int(lengths[record])
        return [rows[at : at + recipe.rows_per_step] for at in range(0, len(rows), recipe.rows_per_step)]

    def train(self, recipe: Recipe, seed: int, store: Store) -> dict[str, Any]:
        aux_layers = store.manifest.aux_layers
        draft = Eagle3Draft(DraftConfig.for_target(self.info, aux_layers, len(self.kept_D), **recipe.norms))
        draft.initialise(self.head, self.kept_D, seed)
        step = DraftStep(draft, self.head, self.kept_D, 7, 0.8, recipe.loss)
        config = {
            "bf16": {"enabled": True},
            "gradient_clipping": 0.5,
            "optimizer": {"params": {"lr": recipe.lr, "betas": [0.9, 0.95], "weight_decay": 0.0}},
        }
        optimizer = PlainOptimizer(step, config, self.ranks)
        steps = [rows for epoch in range(recipe.epochs) for rows in self.rows(recipe, seed, epoch)]
        began, tokens = time.perf_counter(), 0
        for number, rows in enumerate(steps):
            batches = [self.pack(store, row) for row in rows]
            if recipe.padded:
                lengths = [length for batch in batches for length in batch.lengths]
                normaliser = torch.full((7,), len(lengths) * max(lengths))
            else:
                normaliser = torch.stack([step.loss_rows(batch) for batch in batches]).sum(0)
                if recipe.one_count:
                    normaliser = normaliser[:1].expand(7)
            optimizer.accumulate(batches, normaliser)
            rate = learning_rate(number, len(steps), recipe.lr, 0.03)
            optimizer.update(rate, torch.zeros(1), limit=float("inf"))
            tokens += sum(sum(batch.lengths) for batch in batches)
        seconds = time.perf_counter() - began
        found = teacher_forced(draft, step.embedding_VH, self.kept_D, self.held_out(), 7)
        return {"length": found.length, "walk": found.walk_length, "tokens": tokens, "seconds": seconds}

    def held_out(self) -> Iterator[FeatureBatch]:
        """Of the bf16 store, for all."""
        store = self.stores["test"]
        for row in pack_rows(store.lengths, 1024, seed=0, epoch=0):
            yield self.pack(store, list(row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("features", type=Path)
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--fp8", type=Path)
    parser.add_argument("--only", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--draft-vocab-size", type=int, default=8192)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    bench = Bench(options.features, options.model_path, options.draft_vocab_size)
    results: dict[str, Any] = {}
    if options.output and options.output.exists():
        results = json.loads(options.output.read_text(encoding="utf-8"))["recipes"]
    fp8 = Store(options.fp8 / "train", "never") if options.fp8 else None
    for seed in options.seeds:
        for name in options.only:
            store = fp8 if RECIPES[name].fp8 else bench.stores["train"]
            done = results.setdefault(name, {"runs": {}})
            if store is None or str(seed) in done["runs"]:
                continue
            done["runs"][str(seed)] = bench.train(RECIPES[name], seed, store)
            found = [run["length"] for run in done["runs"].values()]
            done["median"], done["spread"] = statistics.median(found), max(found) - min(found)
            print(name, seed, json.dumps(done["runs"][str(seed)]), flush=True)
            if options.output:
                content = {"date": time.strftime("%Y-%m-%d"), "target": bench.info.path, "recipes": results}
                options.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
