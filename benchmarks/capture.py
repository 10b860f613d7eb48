"""What capturing costs beside the engine's bare prefill, and what padded batches would cost. Needs SGLang.

    python -m benchmarks.capture [--target FOLDER] [--tokens N] [--repetitions N]

Arms, all in one process over the same conversations, in turns, each repetition beginning with another one (the last two
take part in every fourth):
  bare      SGLang's prefill of our batches and one head product at the teacher rows: no states, no argmax, no logsumexp
  capture   ours without writing: records of aux and last states and teacher columns, checked for NaN
  store     ours with writing: the same through the writer into a store (bf16) on the disk of --scratch
  in order  ours without writing, batches in the order of the data instead of longest first
  padded    ours without writing, batches of 32 in random order, padded to their longest

A ratio is the median over the repetitions of arm / bare. Results go to benchmarks/results/, with date, machine, commit.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from specforge import hardware, launch
from specforge.alignment import teacher_rows
from specforge.config import DataSettings, EngineSettings
from specforge.data import prepared
from specforge.data.tokenize import ChatTokenizer
from specforge.features.index import Manifest
from specforge.features.packing import in_batches
from specforge.features.passes import Passes
from specforge.features.writer import StoreWriter
from specforge.records import HEAD_LOGITS, Example, FeatureRecord, TargetInfo
from specforge.target import engine as engines
from specforge.target import gguf, weights

ROOT = Path(__file__).parents[1]
PADDED_BATCH = 32
TOKENS_PER_BATCH = 2048


class BareHook:
    """Takes the place of the engine's own: the head product and nothing else."""

    def __init__(self) -> None:
        self.rows = torch.empty(0, dtype=torch.int64)

    def __call__(self, module, args, kwargs) -> None:
        hidden, head = args[1], args[2]
        for piece in hidden[self.rows].split(HEAD_LOGITS // len(head.weight)):
            F.linear(piece, head.weight)


class Arms:
    def __init__(self, engine, info: TargetInfo, examples: list[Example], scratch: Path) -> None:
        self.engine, self.info, self.examples, self.scratch = engine, info, examples, scratch
        self.lengths = np.array([len(example.token_ids) for example in examples])
        self.batches = in_batches(self.lengths, TOKENS_PER_BATCH)
        self.bare_hook, self.pads = BareHook(), 0

    def bare(self) -> None:
        engine, model = self.engine, self.engine._runner.model
        processor, hooks = model.logits_processor, dict(model.logits_processor._forward_pre_hooks)
        layers = model.model.layers_to_capture
        processor._forward_pre_hooks.clear()
        handle = processor.register_forward_pre_hook(self.bare_hook, with_kwargs=True)
        model.capture_aux_hidden_states, model.model.layers_to_capture = False, []
        for batch in self.batches:
            chosen = [self.examples[at] for at in batch]
            lengths = [len(example.token_ids) for example in chosen]
            mask = np.concatenate([example.loss_mask for example in chosen])
            self.bare_hook.rows = torch.from_numpy(teacher_rows(mask, lengths))
            engine._prefill([example.token_ids.tolist() for example in chosen])
        model.capture_aux_hidden_states, model.model.layers_to_capture = True, layers
        handle.remove()
        processor._forward_pre_hooks.update(hooks)

    def capture(self, batches: Sequence[Sequence[int]] | None = None) -> None:
        passes = Passes(self.engine, self.examples)
        for batch in self.batches if batches is None else batches:
            for captured in passes.run(batch):
                assert all(isinstance(record, FeatureRecord) for _, record in captured)

    def in_order(self) -> None:
        batches, tokens = [[]], 0
        for at, length in enumerate(self.lengths):
            if batches[-1] and tokens + length > TOKENS_PER_BATCH:
                batches.append([])
                tokens = 0
            batches[-1].append(at)
            tokens += length
        self.capture(batches)

    def store(self) -> None:
        folder = Path(tempfile.mkdtemp(dir=self.scratch)) / "store"
        manifest = Manifest(
            target=self.info.path,
            target_fingerprint=self.info.fingerprint,
            tokenizer_hash="",
            template_hash="",
            aux_layers=self.engine.aux_layers,
            data_hash="",
            max_length=2048,
            codec="bf16",
            dtype=hardware.name(self.engine.dtype),
            hidden_size=self.info.hidden_size,
            num_records=len(self.examples),
            tokens_per_batch=TOKENS_PER_BATCH,
            engine="sglang",
        )
        passes = Passes(self.engine, self.examples)
        with StoreWriter(folder, manifest) as writer:
            for batch in self.batches:
                for captured in passes.run(batch):
                    for _, record in captured:
                        writer.add(record)

    def padded(self) -> None:
        order = np.random.default_rng(0).permutation(len(self.examples))
        total = 0
        for start in range(0, len(order), PADDED_BATCH):
            chosen = [self.examples[at] for at in order[start : start + PADDED_BATCH]]
            longest = max(len(example.token_ids) for example in chosen)
            total += longest * len(chosen)
            self.engine.capture([_padded(example, longest) for example in chosen])
        self.pads = total


def _padded(example: Example, length: int) -> Example:
    more = length - len(example.token_ids)
    return Example(
        sample_id=example.sample_id,
        token_ids=np.pad(example.token_ids, (0, more)),
        loss_mask=np.pad(example.loss_mask, (0, more)),
    )


def measure(target: Path, tokens: int, repetitions: int, scratch: Path) -> dict[str, object]:
    info, ranks = weights.describe(str(target)), launch.join(1)
    tokenizer = ChatTokenizer(str(target), None)
    splits = prepared.load_splits(ROOT / "examples" / "conversations.jsonl", tokenizer, DataSettings(max_length=1024))
    examples, total = list[Example](), 0
    while total < tokens:
        examples.append(splits["train"][len(examples) % len(splits["train"])])
        total += len(examples[-1].token_ids)
    examples = [Example(sample_id=at, token_ids=e.token_ids, loss_mask=e.loss_mask) for at, e in enumerate(examples)]
    longest = max(len(example.token_ids) for example in examples)
    settings = EngineSettings(engine="sglang", tokens_per_batch=max(TOKENS_PER_BATCH, longest * PADDED_BATCH))
    arms = Arms(engines.load(settings, info, ranks), info, examples, scratch)
    todo: dict[str, Callable[[], None]] = {
        "bare": arms.bare,
        "capture": arms.capture,
        "store": arms.store,
        "in order": arms.in_order,
        "padded": arms.padded,
    }
    for arm in todo.values():
        arm()  # kernels are compiled for each shape, memory is taken
    seconds: dict[str, list[float]] = {name: [] for name in todo}
    to_bare: dict[str, list[float]] = {name: [] for name in todo}
    for repetition in range(repetitions):
        names = list(todo) if repetition % 4 == 0 else ["bare", "capture", "store"]
        turn = repetition % len(names)
        for name in names[turn:] + names[:turn]:
            began = time.perf_counter()
            todo[name]()
            seconds[name].append(time.perf_counter() - began)
        for name in names:
            to_bare[name].append(seconds[name][-1] / seconds["bare"][-1])
        print({name: round(seconds[name][-1], 2) for name in names}, file=sys.stderr, flush=True)
    ratios = {name: statistics.median(found) for name, found in to_bare.items()}
    return {
        "target": target.name,
        "hidden_size": info.hidden_size,
        "dtype": str(info.dtype),
        "records": len(examples),
        "tokens": total,
        "batches": len(arms.batches),
        "share_of_each_pass_filled": total / (len(arms.batches) * TOKENS_PER_BATCH),
        "pad_share": 1.0,
        "pad_share_padded": arms.pads / total,
        "tokens_per_second": {name: total / statistics.median(found) for name, found in seconds.items()},
        "ratio_to_bare": ratios,
        "quartiles_of_ratio": {name: statistics.quantiles(found, n=4)[::2] for name, found in to_bare.items()},
        "padded_to_capture": ratios["padded"] / ratios["capture"],
        "seconds": seconds,
    }


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{len(os.sched_getaffinity(0))} cores of {model}, no accelerator used"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, help="a model folder (default: SmolLM2-135M-Instruct and a tiny Llama)")
    parser.add_argument("--tokens", type=int, help="(default: 8,000, and 50,000 for the tiny one)")
    parser.add_argument("--repetitions", type=int, default=41)
    parser.add_argument("--scratch", type=Path, help="where stores are written (default: a temporary folder)")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # one target: SGLang takes one a process
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        if options.one:
            print(json.dumps(measure(options.target, options.tokens, options.repetitions, Path(scratch))))
            return
        targets = {options.target: options.tokens or 8_000} if options.target else default_targets(Path(scratch))
        results = []
        for target, tokens in targets.items():
            given = ["--target", str(target.resolve()), "--tokens", str(options.tokens or tokens)]
            given += ["--repetitions", str(options.repetitions)]
            command = [sys.executable, "-m", "benchmarks.capture", "--one", *given]
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
            results.append(json.loads(done.stdout.splitlines()[-1]))
            shown = {name: round(ratio, 3) for name, ratio in results[-1]["ratio_to_bare"].items()}
            print(f"{results[-1]['target']}: {shown}", flush=True)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    today = datetime.date.today().isoformat()
    content = {"date": today, "machine": machine(), "commit": commit.stdout.strip(), "results": results}
    path = ROOT / "benchmarks" / "results" / f"capture_{len(os.sched_getaffinity(0))}-core-cpu_{today}.json"
    path.write_text(json.dumps(content, indent=2) + "\n")
    print(path)


def default_targets(scratch: Path) -> dict[Path, int]:
    from tests.tiny import make_target

    return {
        gguf.smollm2(ROOT / "cache" / "models" / "SmolLM2-135M-Instruct"): 8_000,
        make_target(scratch / "tiny-llama", dtype=torch.bfloat16): 50_000,
    }


if __name__ == "__main__":
    main()
