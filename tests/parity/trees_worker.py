"""Run by test_trees.py: prompts decoded plainly and with good, bad and random drafts through SGLang in fp32, and what
the session does with its places. Prints one JSON line.

    trees_worker.py TARGET PROMPTS MAX_NEW_TOKENS"""

from __future__ import annotations

import json
import random
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from specforge import launch
from specforge.config import EngineSettings
from specforge.draft.model import DraftConfig, Eagle3Draft
from specforge.draft.step import DraftStep
from specforge.evaluate import decode
from specforge.evaluate.acceptance import teacher_forced
from specforge.evaluate.decode import Limits
from specforge.evaluate.drafter import Drafting
from specforge.evaluate.replay import walk
from specforge.evaluate.shape import Shape
from specforge.records import Example, FeatureBatch
from specforge.target import engine as engines
from specforge.target import weights
from specforge.target.sglang.engine import SglangEngine, _Session
from specforge.train.plain import PlainOptimizer
from tests import tiny
from tests.parity.sglang_worker import error

STEPS, EPOCHS, ROWS = 3, 8, 16
SHAPES = {"chain": Shape.chain(STEPS), "tree": Shape(steps=STEPS, top_k=3, draft_tokens=8)}


def main() -> None:
    target, count, limits = Path(sys.argv[1]), int(sys.argv[2]), Limits(max_new_tokens=int(sys.argv[3]))
    ranks, info = launch.join(1), weights.describe(str(target))
    engine = engines.load(EngineSettings(engine="sglang", tokens_per_batch=2048), info, ranks)
    tokenizer, source = tiny.tokenizer(), random.Random(0)
    limits = replace(limits, stop_ids=[tokenizer.eos_token_id])
    questions = [tiny.sentence(source, 1 + at % 9) for at in range(count)]
    said = [f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in questions]
    prompts = [tokenizer.encode(text) for text in said]
    result: dict[str, object] = {"session": session(engine, prompts[0])}
    own = decode.plain(engine, prompts, limits, record=True)
    result["tokens"] = sum(len(text.tokens) for text in own.texts)
    result["plain, 4"] = equal(own, decode.plain(engine, prompts, replace(limits, batch_size=4)))
    asked = [example(number, text) for number, text in enumerate(own.texts)]
    records = [record for at in range(0, count, ROWS) for record in engine.capture(asked[at : at + ROWS])]
    head, kept = weights.load_head(info, torch.float32), torch.arange(info.vocab_size)
    free = watch_the_ends(engine)
    for name, draft in drafts(info, engine, head, kept, records, ranks).items():
        drafting = Drafting(draft=draft, embedding_VH=head.embedding_VH, kept_D=kept, shape=SHAPES["chain"])
        for kind, shape in SHAPES.items():
            for batch_size in (1, 4):
                here, at_once = replace(drafting, shape=shape), replace(limits, batch_size=batch_size)
                began = time.perf_counter()
                fast = decode.speculative(engine, here, prompts, at_once)
                seconds = time.perf_counter() - began
                result[f"{name}, {kind}, {batch_size}"] = {
                    "equal": equal(own, fast),
                    "length": fast.length,
                    "replayed": walk(here, own.texts, at_once)[0].length,
                    "free": free[-1],
                    "seconds": seconds,
                }
        batch = FeatureBatch.pack(records, ranks.device, torch.float32)
        result[f"{name}, walked"] = teacher_forced(draft, head.embedding_VH, kept, [batch], STEPS).walk_length
    result["pool"] = engine._runner.token_to_kv_pool_allocator.size
    print(json.dumps(result), flush=True)


def equal(own: decode.Decoded, other: decode.Decoded) -> int:
    return sum(a.tokens == b.tokens for a, b in zip(own.texts, other.texts, strict=True))


def example(number: int, text: decode.Text) -> Example:
    ids = np.array([*text.prompt, *text.tokens], dtype=np.int32)
    return Example(sample_id=number, token_ids=ids, loss_mask=np.arange(len(ids)) >= len(text.prompt))


def watch_the_ends(engine: SglangEngine) -> list[int]:
    """Free places of the KV pool at the end of each session, before it gives back what is left."""
    free, close = list[int](), _Session.close

    def watched(session: _Session) -> None:
        free.append(engine._runner.token_to_kv_pool_allocator.available_size())
        close(session)

    _Session.close = watched
    return free


def drafts(info, engine, head, kept, records, ranks) -> dict[str, Eagle3Draft]:
    """A random one; a good one, trained on the very texts; and one that has learned to be wrong: the good one with the
    rows of its head in another order."""
    found = {}
    for name in ("random", "good", "bad"):
        found[name] = Eagle3Draft(DraftConfig.for_target(info, engine.aux_layers, len(kept))).eval()
        found[name].initialise(head, kept, seed=0)
    step = DraftStep(found["good"], head, kept, STEPS, 0.8)
    config = {"gradient_clipping": 1.0, "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "betas": [0.9, 0.95]}}}
    optimizer = PlainOptimizer(step, config, ranks)
    for epoch in range(EPOCHS):
        for start in range(0, len(records), ROWS):
            batch = FeatureBatch.pack(records[start : start + ROWS], ranks.device, torch.float32)
            for result in optimizer.accumulate([batch], step.loss_rows(batch)):
                print(epoch, float(result.loss.detach()), file=sys.stderr)
            optimizer.update(1.0, torch.zeros(1), limit=float("inf"))
    found["good"].eval()
    found["bad"].load_state_dict(found["good"].state_dict())
    with torch.no_grad():
        found["bad"].lm_head.weight.copy_(found["bad"].lm_head.weight.roll(1, 0))
    return found


def session(engine, prompt) -> dict[str, float]:
    """Two sequences, 200 passes of one to three paths: their logits and states against whole prefills, and whether the
    pool holds what is kept and nothing else."""
    allocator, source = engine._runner.token_to_kv_pool_allocator, torch.Generator().manual_seed(0)
    own, kept, checks, forgotten = engine.session(), {7: list(prompt), 3: list(prompt[:5])}, [], set()
    before = allocator.available_size()
    own.extend({number: [ids] for number, ids in kept.items()})
    for number, ids in kept.items():
        own.keep(number, 0, len(ids))
    for turn in range(200):
        lengths = ([2], [1, 3, 2], [4, 4], [1])[turn % 4]
        paths = [torch.randint(3, 100, (n,), generator=source).tolist() for n in lengths]
        states = own.extend({7: paths, 3: paths[:1]})
        if turn % 40 < 4:
            checks += [(kept[7] + path, *state) for path, state in zip(paths, states[7], strict=True)]
            checks.append((kept[3] + paths[0], *states[3][0]))
        path = turn % len(paths)
        own.keep(7, path, turn % 2)
        own.keep(3, 0, 0)
        kept[7] += paths[path][: turn % 2]
        forgotten.add(before - allocator.available_size() - sum(map(len, kept.values())))
    own.extend({7: [[5, 6], [7]]})
    own.drop(7)  # not kept before
    own.drop(3)
    after = allocator.available_size()
    own.close()
    worst = {"logits": 0.0, "aux": 0.0, "shifted": 1.0}
    for ids, logits_nV, aux_nA in checks:
        whole = engine.session()
        ((want_TV, want_TA),) = whole.extend({0: [ids]})[0]
        whole.close()
        worst["logits"] = max(worst["logits"], error(logits_nV, want_TV[-len(logits_nV) :]))
        worst["aux"] = max(worst["aux"], error(aux_nA, want_TA[-len(aux_nA) :]))
        worst["shifted"] = min(worst["shifted"], error(logits_nV, want_TV[-len(logits_nV) - 1 : -1]))
    return worst | {"leaked": before - after, "forgotten": max(forgotten), "checks": len(checks)}


if __name__ == "__main__":
    main()
