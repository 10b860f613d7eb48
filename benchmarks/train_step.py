"""One draft training step (forward, loss, backward): ours against the usual dense eager step, in time and memory.

    python benchmarks/train_step.py [--rounds 5] [--output FILE]

Same weights, same tokens, both in bf16 on this machine's CPU. The shape is SmolLM2-135M's with a draft vocabulary of
32,000 and seven steps. Times are medians of interleaved rounds, memory the growth of the resident set's peak in a
process of its own. `tests/eager_reference.py` is frozen: its hash is checked."""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import specforge  # noqa: F401  before torch: it sets how CPU libraries allocate and repeat
from specforge.alignment import teacher_rows
from specforge.draft.model import DraftConfig, Eagle3Draft
from specforge.draft.step import DraftStep
from specforge.features.packing import pack_rows
from specforge.launch import _keep_freed_memory
from specforge.records import FeatureBatch, FeatureRecord, TargetHead
from tests import eager_reference

ROOT = Path(__file__).parent.parent
REFERENCE_SHA256 = "ffec66867e93bcee08b2234c9ef66954c7d1a590d75363b8f20697c379277d5a"
VOCAB, DRAFT_VOCAB, TOKENS, TURN, STEPS, DECAY = 49152, 32000, 1024, 128, 7, 0.8
CONFIG = DraftConfig(
    hidden_size=576,
    intermediate_size=1536,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    rms_norm_eps=1e-5,
    vocab_size=VOCAB,
    draft_vocab_size=DRAFT_VOCAB,
    max_position_embeddings=8192,
    rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    aux_layers=(1, 14, 26),
)
CHAT = (48, 64, 72, 96, 110, 128, 150, 180, 220, 300, 420, 700)  # tokens: a chat length distribution, drawn with a seed
SHARES = (1.0, 0.5, 0.25)


def record(length: int, share: float, seed: int, head: TargetHead) -> dict[str, torch.Tensor]:
    """One conversation of turns of 128 tokens, of each the last `share` supervised; states are random."""
    source = torch.Generator().manual_seed(seed)
    mask_T = torch.arange(length) % TURN >= round(TURN * (1 - share))
    aux_TA = torch.randn(length, 3 * CONFIG.hidden_size, generator=source).bfloat16()
    last_TH = torch.randn(length, CONFIG.hidden_size, generator=source).bfloat16()
    ids_T = torch.randint(VOCAB, (length,), generator=source)
    return {"ids": ids_T, "mask": mask_T, "aux": aux_TA, "last": last_TH}


def packed(found: list[dict[str, torch.Tensor]], head: TargetHead) -> FeatureBatch:
    records = []
    for number, one in enumerate(found):
        rows_S = torch.from_numpy(teacher_rows(one["mask"].numpy()))
        logits_SV = head.logits(one["last"][rows_S])
        records.append(
            FeatureRecord(
                sample_id=number,
                token_ids=one["ids"].int(),
                loss_mask=one["mask"],
                aux=one["aux"],
                last=one["last"][rows_S],
                teacher_top1=logits_SV.argmax(-1).int(),
                teacher_lse=logits_SV.logsumexp(-1),
            )
        )
    return FeatureBatch.pack(records, torch.device("cpu"), torch.bfloat16)


class Case:
    """Both steps over the same records, the same weights."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        table_VH = (torch.randn(VOCAB, CONFIG.hidden_size) * 0.05).bfloat16()
        self.head = TargetHead(embedding_VH=table_VH, head_VH=table_VH)
        self.kept_D = torch.randperm(VOCAB)[:DRAFT_VOCAB].sort().values
        draft = Eagle3Draft(CONFIG)
        draft.initialise(self.head, self.kept_D, 0)
        self.step = DraftStep(draft.bfloat16(), self.head, self.kept_D, STEPS, DECAY)

    def ours(self, batches: list[FeatureBatch]) -> float:
        normaliser = torch.stack([self.step.loss_rows(batch) for batch in batches]).sum(0)
        self.step.zero_grad(set_to_none=True)
        total = 0.0
        for batch in batches:
            result = self.step(batch, normaliser)
            result.loss.backward()
            total += float(result.loss)
        return total

    def eager(self, found: list[list[dict[str, torch.Tensor]]]) -> float:
        self.step.zero_grad(set_to_none=True)
        total = 0.0
        for records in found:
            longest = max(len(one["ids"]) for one in records)

            def padded(name: str, records: Any = records, longest: int = longest) -> torch.Tensor:
                return torch.nn.utils.rnn.pad_sequence([one[name] for one in records], batch_first=True)

            w = dict(self.step.draft.named_parameters())
            inputs = [padded(name) for name in ("ids", "mask", "aux", "last")]
            table = self.head.head_VH
            loss = eager_reference.step_loss(w, CONFIG, table, table, self.kept_D, *inputs, STEPS, DECAY)
            loss.backward()
            total += float(loss)
        return total


def workload(name: str, case: Case) -> tuple[list[FeatureBatch], list[list[dict[str, torch.Tensor]]], int]:
    """(packed rows for ours, padded batches for the reference, tokens)."""
    if name != "chat":
        records = [record(TOKENS, float(name), 0, case.head)]
        return [packed(records, case.head)], [records], TOKENS
    source = random.Random(0)
    records = [record(source.choice(CHAT), 0.5, at, case.head) for at in range(16)]
    rows = pack_rows(np.array([len(one["ids"]) for one in records]), TOKENS, seed=0, epoch=0)
    ours = [packed([records[at] for at in row], case.head) for row in rows]
    return ours, [records[:8], records[8:]], sum(len(one["ids"]) for one in records)


def timed(name: str, rounds: int) -> dict[str, Any]:
    case = Case()
    ours, eager, tokens = workload(name, case)
    losses = case.ours(ours), case.eager(eager)
    seconds: dict[str, list[float]] = {"ours": [], "eager": []}
    for _ in range(rounds):
        for which, run in (("ours", lambda: case.ours(ours)), ("eager", lambda: case.eager(eager))):
            seconds[which].append(clocked(run))
    medians = {which: statistics.median(found) for which, found in seconds.items()}
    return {
        "tokens": tokens,
        "loss": dict(zip(("ours", "eager"), losses, strict=True)),
        "seconds": medians,
        "tokens_per_second": {which: round(tokens / found) for which, found in medians.items()},
        "time_ratio": medians["ours"] / medians["eager"],
    }


def clocked(run: Callable[[], float]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def peak(name: str, which: str) -> float:
    """MB by which the resident set's peak grows in one step; run in a process of its own."""
    case = Case()
    ours, eager, _ = workload(name, case)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # or what the set-up freed would hide the first growth
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew at what is resident now
    before = peak_kb()
    case.ours(ours) if which == "ours" else case.eager(eager)
    return (peak_kb() - before) / 1024


def peak_kb() -> int:
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", nargs="+", default=[*map(str, SHARES), "chat"])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    _keep_freed_memory()
    if options.peak:
        print(peak(*options.peak))
        return
    found = hashlib.sha256((ROOT / "tests" / "eager_reference.py").read_bytes()).hexdigest()
    if found != REFERENCE_SHA256:
        sys.exit(f"tests/eager_reference.py has changed (sha256 {found}): figures would not compare with earlier ones")
    results = {}
    for name in options.cases:
        results[name] = timed(name, options.rounds)
        memory = {}
        for which in ("ours", "eager"):
            done = subprocess.run(
                [sys.executable, __file__, "--peak", name, which], capture_output=True, text=True, check=True
            )
            memory[which] = float(done.stdout.split()[-1])
        results[name] |= {"peak_mb": memory, "memory_ratio": memory["ours"] / memory["eager"]}
        print(name, json.dumps(results[name]), flush=True)
    if options.output:
        content = {"date": time.strftime("%Y-%m-%d"), "threads": torch.get_num_threads(), "cases": results}
        options.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
