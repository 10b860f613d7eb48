"""Run by test_sglang.py, once a rank: SGLang's states against transformers', and with --deepspeed a draft trained over
all ranks of the same processes. Prints one JSON line on rank 0."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from specforge import hardware, launch
from specforge.alignment import teacher_rows
from specforge.config import EngineSettings
from specforge.errors import EngineError
from specforge.records import Example, Ranks, TargetEngine
from specforge.target import engine as engines
from specforge.target import weights
from specforge.target.hf_engine import HfEngine
from specforge.target.sglang.layers import LayerHooks

LENGTHS = (5, 64, 200, 33)


def examples(vocab_size: int, seed: int) -> list[Example]:
    random = np.random.default_rng(seed)
    found = []
    for number, length in enumerate(LENGTHS):
        mask = np.zeros(length, dtype=np.bool_)
        mask[length // 3 : length - 1] = True
        ids = random.integers(3, vocab_size, length).astype(np.int32)
        found.append(Example(sample_id=number, token_ids=ids, loss_mask=mask))
    return found


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative to the scale of what is wanted."""
    found = float((got.float() - want.float()).norm() / want.float().norm())
    assert math.isfinite(found)  # max() would pass over NaN
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("target")
    parser.add_argument("--tp-size", type=int, default=1)
    parser.add_argument("--deepspeed", action="store_true")
    options = parser.parse_args()
    ranks = launch.join(options.tp_size)
    engine, asked, result = compare(Path(options.target), ranks)
    if options.deepspeed:
        result["losses"] = train_over_all_ranks(engine, asked, ranks, Path(options.target))
    gathered: list[object] = [None] * ranks.world
    dist.all_gather_object(gathered, result)
    if ranks.rank == 0:
        print(json.dumps(gathered), flush=True)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # as the command line's ranks end


def compare(target: Path, ranks: Ranks) -> tuple[TargetEngine, list[Example], dict[str, object]]:
    """The engine, the examples, and how far its states and teacher columns are from transformers'."""
    info = weights.describe(str(target))
    layers = weights.default_aux_layers(info.num_layers)
    settings = EngineSettings(
        engine="sglang", tp_size=ranks.tp_size, tokens_per_batch=1024, dtype=hardware.name(info.dtype)
    )
    engine = engines.load(settings, info, ranks)  # with its self-check
    alone = type(ranks)(rank=0, world=1)
    text = target / "text"  # where the target is multimodal: its language model
    oracle = HfEngine(
        weights.describe(str(text)) if text.exists() else info, layers, alone, dtype=info.dtype, tokens_per_batch=1024
    )
    head = weights.load_head(info, info.dtype)
    asked = examples(info.vocab_size, seed=ranks.replica)  # replicas see different data
    worst = {"aux": 0.0, "last": 0.0, "lse": 0.0, "head_lse": 0.0}
    same_top1 = total = 0
    for one, two in zip(engine.capture(asked), oracle.capture(asked), strict=True):
        assert len(one.last) == len(teacher_rows(one.loss_mask.numpy()))
        worst["aux"] = max(worst["aux"], error(one.aux, two.aux))
        worst["last"] = max(worst["last"], error(one.last, two.last))
        worst["lse"] = max(worst["lse"], error(one.teacher_lse, two.teacher_lse))
        logits = head.logits(one.last)  # over the whole vocabulary, as training recomputes it over the draft's
        worst["head_lse"] = max(worst["head_lse"], error(logits.logsumexp(-1), one.teacher_lse))
        same_top1 += int((one.teacher_top1 == two.teacher_top1).sum())
        total += len(one.teacher_top1)
    same_bits, gathered_rows = vocabulary_parallel(engine, asked, ranks)
    aux, right = engine.capture(asked)[2].aux, oracle.capture(asked)[2].aux
    oracle.aux_layers = others = tuple(layer + 1 for layer in layers)
    read_again = 0.0
    if engines.read_layers(engine, others):  # as `check` does with a running engine
        read_again = error(engine.capture(asked)[2].aux, oracle.capture(asked)[2].aux)
        engines.read_layers(engine, layers)
    result = {
        **worst,
        "top1": same_top1 / total,
        "shifted_token": error(aux[1:], right[:-1]),
        "shifted_layer": error(aux, oracle.capture(asked)[2].aux),
        "same_bits": same_bits,
        "gathered_rows": gathered_rows,
        "read_again": read_again,
        "by_hooks": by_hooks(engine, asked),
        "drafts_told_apart": drafts_told_apart(engine, ranks),
        "serves_eagle3": engine.serves_eagle3,
    }
    return engine, asked, result


def drafts_told_apart(engine: TargetEngine, ranks: Ranks) -> bool:
    """Whether a session refuses paths that differ between the ranks of a replica."""
    session = engine.session()
    try:
        session.extend({0: [[5, 6 + ranks.tp_rank]]})
    except EngineError as error:
        return "drafted different tokens" in error.what
    finally:
        session.close()
    return ranks.tp_size == 1


def by_hooks(engine: TargetEngine, asked: list[Example]) -> float:
    """How far the states of hooks on the layers are from those that SGLang captures itself: they are a pair, or lie in
    the batch's residual stream. 0 where the engine needs hooks anyway."""
    if not engine.serves_eagle3:
        return 0.0
    hooks = LayerHooks(engine._runner.model, engine.info.num_layers, engine.aux_layers)
    own = torch.cat([record.aux for record in engine.capture(asked)])
    found = torch.cat(hooks.states(), dim=-1)
    hooks.remove()
    return error(found, own)


def vocabulary_parallel(engine: TargetEngine, asked: list[Example], ranks: Ranks) -> tuple[bool, int]:
    """(whether the teacher columns have the bits of the same reduction on whole logits, most rows that SGLang gathers
    over the vocabulary in the passes of a capture)."""
    from specforge.target import teacher
    from specforge.target.sglang import names as sgl

    processors = [module for module in engine._runner.model.modules() if isinstance(module, sgl.LogitsProcessor)]
    rows, gatherer, hook = [0], processors[-1]._logits_gatherer, engine._hook
    for processor in processors:
        processor._logits_gatherer = lambda logits: rows.append(len(logits)) or gatherer(logits)
    engine.capture(asked)
    top1, lse = hook.top1.clone(), hook.lse.clone()
    for processor in processors:
        processor._logits_gatherer = gatherer
    hook.keep_logits = True
    engine.capture(asked)
    hook.keep_logits = False
    shards = 1 if "Gemma3" in type(engine._runner.model).__name__ else ranks.tp_size  # there each rank has all of it
    parts = hook.logits.split(-(-hook.logits.shape[1] // shards), dim=1)  # 512 ids: no rank has spare rows
    best_rn, lse_rn = map(torch.stack, zip(*map(teacher.columns, parts), strict=True))
    most_rn = torch.stack([part.amax(1) for part in parts])
    best_rn += torch.tensor([[at * parts[0].shape[1]] for at in range(len(parts))])
    want_top1 = best_rn.gather(0, most_rn.argmax(0, keepdim=True))[0]
    want_lse = lse_rn.double().logsumexp(0).float() if len(parts) > 1 else lse_rn[0]
    same = torch.equal(top1, want_top1) and torch.equal(top1, hook.logits.argmax(1).int())
    return same and torch.equal(lse, want_lse), max(rows)


def train_over_all_ranks(engine, asked, ranks, target: Path) -> list[float]:
    """Live rows through LiveSource, the real draft step and optimizer; every rank trains on its own row."""
    from specforge.config import TrainSettings
    from specforge.draft.model import DraftConfig, Eagle3Draft
    from specforge.draft.step import DraftStep
    from specforge.features.sources import LiveSource
    from specforge.records import FeatureBatch
    from specforge.train.optimizer import DraftOptimizer, deepspeed_config
    from specforge.train.recipe import choose

    root = Path(__file__).parents[2]
    settings = TrainSettings(
        online=True, batch_size=ranks.world, lr=1e-3, deepspeed_config=root / "ds_config.json", max_grad_norm=1.0
    )
    kept = torch.arange(engine.info.vocab_size)
    head = weights.load_head(engine.info, torch.bfloat16)
    draft = Eagle3Draft(DraftConfig.for_target(engine.info, engine.aux_layers, len(kept)))
    draft.initialise(head, kept, seed=0)
    step = DraftStep(draft, head, kept, 7, 0.8)
    recipe, _ = choose(settings, tokens=1000, hidden_size=engine.info.hidden_size, world=ranks.world)
    optimizer = DraftOptimizer(step, deepspeed_config(settings, recipe, ranks, torch.bfloat16), ranks)
    source = LiveSource(engine, asked, ranks.tp_rank)
    rows = [[1], [2]] if ranks.tp_size == 2 else [[1, 2]]
    losses = []
    for records in source.batches([rows] * 6):
        batch = FeatureBatch.pack(records, ranks.device, torch.bfloat16)
        normaliser = step.loss_rows(batch)
        dist.all_reduce(normaliser)
        (result,) = optimizer.accumulate([batch], normaliser)
        assert optimizer.update(1.0, torch.zeros(1), limit=float("inf")).applied
        loss = result.loss.detach()
        dist.all_reduce(loss)
        losses.append(float(loss))
    return losses


if __name__ == "__main__":
    main()
