"""The target: captured states against those of transformers, speculative decoding against plain decoding."""

from __future__ import annotations

from dataclasses import replace

import torch

from specforge.config import EngineSettings
from specforge.draft.model import DraftConfig, Eagle3Draft
from specforge.evaluate.decode import Limits, compare, plain, speculative
from specforge.evaluate.drafter import Drafting
from specforge.evaluate.shape import Shape
from specforge.pipeline.gpu.made_up import random_examples
from specforge.pipeline.gpu.results import SHORT, Result, checked, norm_apart, shown, within
from specforge.pipeline.gpu.waits import capture_waits
from specforge.records import Ranks, TargetEngine, TargetInfo
from specforge.target import engine as engines
from specforge.target import weights
from specforge.target.hf_engine import HfEngine

# Relative to the scale of the states; from tests/parity/test_sglang.py. bf16: rounding over 8 layers gives 0.5 to
# 1.1 %, or 2.3 % if each block's output is normed before it is added. fp32: a CPU has the same kernels for both; those
# of a GPU may multiply in TF32, whose products are off by 5e-4. One token or one layer off is 10 % and more apart.
STATES_BOUND = {torch.bfloat16: 0.015, torch.float32: 1e-5}
POST_NORM_BOUND, POST_NORM = 0.03, ("olmo2", "gemma3_text")
TF32_BOUND = 2e-3
TOP1_APART = {torch.bfloat16: 0.1, torch.float32: 1e-3}  # near-ties of random weights
NOTICED = 0.1
TOKENS_PER_BATCH = 1024
MEM_FRAC = 0.5  # the other half is for transformers' copy


def states_bound(info: TargetInfo, dtype: torch.dtype, device: torch.device) -> float:
    if dtype == torch.float32:
        return TF32_BOUND if device.type == "cuda" else STATES_BOUND[dtype]
    return POST_NORM_BOUND if info.config.get("model_type") in POST_NORM else STATES_BOUND[torch.bfloat16]


def states(engine: TargetEngine, oracle: TargetEngine) -> Result:
    """Captured records of `engine` against those of `oracle`: aux and last states, teacher columns. `apart if shifted`
    is how far the same states are apart one token later: a bound that could not notice this would mean nothing."""
    asked = random_examples(engine.info.vocab_size)
    pairs = list(zip(engine.capture(asked), oracle.capture(asked), strict=True))
    names = {"aux": "aux", "last": "last", "lse": "teacher_lse"}
    found = {n: max(norm_apart(getattr(a, of), getattr(b, of)) for a, b in pairs) for n, of in names.items()}
    ours, theirs = (torch.cat([pair[at].teacher_top1.cpu() for pair in pairs]) for at in (0, 1))
    found["top1"] = float((ours != theirs).double().mean())
    bound = states_bound(engine.info, engine.dtype, engine.device)
    bounds = dict.fromkeys(names, bound) | {"top1": TOP1_APART[engine.dtype]}
    one, two = pairs[2]
    shifted = norm_apart(one.aux[1:], two.aux[:-1])
    result = within(f"states of {engine.name}, {SHORT[engine.dtype]}", found, bounds)
    return replace(
        result,
        found=f"{result.found}; {shown(shifted)} apart if shifted",
        bound=f"{result.bound}; over {NOTICED}",
        passed=bool(result.passed and shifted > NOTICED),
    )


def lossless(engine: TargetEngine) -> list[Result]:
    """Greedy texts by speculative decoding, a chain and a tree, against plain decoding, with a random draft over the
    words of these texts, so that some of its tokens are accepted. In fp32 each text must be equal, token for token."""
    prompts = [example.token_ids.tolist() for example in random_examples(engine.info.vocab_size, (9, 20, 33, 48))]
    limits = Limits(max_new_tokens=24, batch_size=2)
    own = plain(engine, prompts, limits)
    kept_D = torch.tensor(sorted({token for text in own.texts for token in text.tokens} | set(range(8))))
    head = weights.load_head(engine.info, torch.float32)
    draft = Eagle3Draft(DraftConfig.for_target(engine.info, engine.aux_layers, len(kept_D))).eval()
    draft.initialise(head, kept_D, seed=0)
    head = head.to(engine.device)
    found = []
    for shape in (Shape.chain(3), Shape(steps=3, top_k=4, draft_tokens=12)):
        drafting = Drafting(
            draft=draft.to(engine.device), embedding_VH=head.embedding_VH, kept_D=kept_D.to(engine.device), shape=shape
        )
        fast = speculative(engine, drafting, prompts, limits)
        result = compare(zip(own.texts, fast.texts, strict=True), engine.dtype)
        found.append(
            Result(
                what=f"lossless decoding in {engine.name}, {SHORT[engine.dtype]}, {shape}",
                found=f"{result.equal} of {len(prompts)} texts equal, {fast.length:.2f} tokens a pass",
                bound=f"{len(prompts)} equal",
                passed=result.equal == len(prompts),
            )
        )
    return found


def through_hf(ranks: Ranks, model_path: str) -> list[Result]:
    """Decoding in transformers in fp32: for machines without SGLang."""
    info = weights.describe(model_path)
    layers = weights.default_aux_layers(info.num_layers)
    alone = Ranks(device=ranks.device)
    return lossless(HfEngine(info, layers, alone, dtype=torch.float32, tokens_per_batch=TOKENS_PER_BATCH))


def through_sglang(ranks: Ranks, model_path: str, dtype: torch.dtype) -> list[Result]:
    """All checks of one SGLang engine: a process takes one."""
    info = weights.describe(model_path)
    settings = EngineSettings(
        engine="sglang",
        dtype=next(name for name, of in engines.DTYPES.items() if of == dtype),
        tp_size=ranks.tp_size,
        mem_frac=MEM_FRAC,
        tokens_per_batch=TOKENS_PER_BATCH,
    )
    engine = engines.load(settings, info, ranks)
    alone = Ranks(device=ranks.device)
    oracle = HfEngine(info, engine.aux_layers, alone, dtype=dtype, tokens_per_batch=TOKENS_PER_BATCH)
    found = checked(f"states, {SHORT[dtype]}", lambda: [states(engine, oracle)])
    if dtype == torch.float32:
        return found + checked("lossless decoding", lambda: lossless(engine))
    if ranks.device.type == "cuda":
        found += checked("host waits, capture", lambda: [capture_waits(engine)])
    return found
