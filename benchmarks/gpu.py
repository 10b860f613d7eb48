"""Capture and training on a GPU, each as a share of the card's own bf16 matrix rate, and memory against the plan.

    python benchmarks/gpu.py [--rounds 5] [--small] [--output FILE]

Training: one packed row of 8,192 tokens in four records, half of them supervised, through a draft of an 8B target
(hidden size 4,096, draft vocabulary 32,000, seven steps): forward, loss and backward, then with Muon's update. Capture:
passes of 8,192 tokens through a random target of that shape with 8 layers, in SGLang and in transformers. Operations
are counted by torch's FlopCounterMode while the same work runs. Times are medians of interleaved rounds, clocked on the
device. `--small` tries the script itself out, on a CPU too; its figures mean nothing.

The result goes to benchmarks/results/gpu_CARD_DATE.json."""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import specforge  # noqa: F401  before torch's libraries: it sets how they repeat
from specforge import launch
from specforge.config import EngineSettings
from specforge.pipeline.gpu import made_up, training
from specforge.records import Example, FeatureBatch, Ranks
from specforge.target import engine as engines
from specforge.target import weights

RESULTS = Path(__file__).parent / "results"
LARGE = made_up.Size(
    config=made_up.draft_config(4096, 14336, 32, 8, 128256, 32000), lengths=(4096, 2048, 1024, 1024), turn=1024
)
SMALL = made_up.Size(config=made_up.draft_config(64, 128, 4, 2, 512, 256), lengths=(64, 32, 16, 16), turn=16)


@dataclass(frozen=True)
class Bench:
    device: torch.device
    rounds: int
    matrix: int  # side of the square matrices that measure the rate

    def seconds(self, work: Callable[[], object]) -> float:
        if self.device.type == "cpu":
            began = time.perf_counter()
            work()
            return time.perf_counter() - began
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    def medians(self, arms: dict[str, Callable[[], object]]) -> dict[str, float]:
        """Seconds of each arm, in turn; each runs once before."""
        for work in arms.values():
            work()
        found: dict[str, list[float]] = {name: [] for name in arms}
        for _ in range(self.rounds):
            for name, work in arms.items():
                found[name].append(self.seconds(work))
        return {name: statistics.median(times) for name, times in found.items()}

    def rate(self) -> Callable[[], object]:
        a, b = (torch.randn(self.matrix, self.matrix, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        return lambda: a @ b


def operations(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def training_step(bench: Bench, size: made_up.Size, ranks: Ranks) -> dict[str, Any]:
    head, kept_D, records = made_up.made_up(size, bench.device)
    step = made_up.draft_step(size, head, kept_D, bench.device, torch.bfloat16)
    batch = FeatureBatch.pack(records, bench.device, torch.bfloat16)
    del records, head
    optimizer = training.make_optimizer("plain", step, torch.bfloat16, ranks)

    def gradients() -> None:
        step.zero_grad(set_to_none=True)
        step(batch, step.loss_rows(batch).to(bench.device)).loss.backward()

    def whole() -> None:
        training.train_once(step, optimizer, batch, bench.device)

    whole()
    count, tokens = operations(gradients), sum(size.lengths)
    seconds = bench.medians({"matrices": bench.rate(), "gradients": gradients, "with update": whole})
    rate = 2 * bench.matrix**3 / seconds["matrices"]
    return {
        "tokens": tokens,
        "supervised": size.share,
        "matrix_rate_tflops": rate / 1e12,
        "operations": count,
        "seconds": {name: seconds[name] for name in ("gradients", "with update")},
        "tokens_per_second": {name: tokens / seconds[name] for name in ("gradients", "with update")},
        "share_of_matrix_rate": count / seconds["gradients"] / rate,
    }


def memory(size: made_up.Size, ranks: Ranks) -> dict[str, str]:
    """A row of which every token is supervised, as `specforge plan` counts it."""
    result = training.memory("none", ranks, replace(size, share=1.0))
    return {"found": result.found, "bound": result.bound, "passed": str(result.passed)}


def capture(bench: Bench, size: made_up.Size, ranks: Ranks) -> dict[str, Any]:
    tokens, random = sum(size.lengths), np.random.default_rng(0)
    examples = [
        Example(
            sample_id=number,
            token_ids=random.integers(3, size.config.vocab_size, length).astype(np.int32),
            loss_mask=np.arange(length) % size.turn >= size.turn // 2,
        )
        for number, length in enumerate(size.lengths)
    ]
    found: dict[str, Any] = {"tokens": tokens, "layers": 8}
    arms: dict[str, Callable[[], object]] = {"matrices": bench.rate()}
    with tempfile.TemporaryDirectory() as folder:
        target = made_up.make_target(Path(folder) / "target", torch.bfloat16, size.config)
        info = weights.describe(str(target))
        problem = engines.sglang_problem()
        if problem:
            found["sglang"] = f"not measured: {problem}"
        for name in ("hf",) if problem else ("sglang", "hf"):
            settings = EngineSettings(engine=name, tokens_per_batch=tokens, mem_frac=0.5, dtype="bfloat16")
            engine = engines.load(settings, info, ranks)
            arms[name] = lambda engine=engine: engine.capture(examples)
        count = operations(arms["hf"])
        seconds = bench.medians(arms)
    rate = 2 * bench.matrix**3 / seconds.pop("matrices")
    found |= {"matrix_rate_tflops": rate / 1e12, "operations": count}
    for name, taken in seconds.items():
        found[name] = {"tokens_per_second": tokens / taken, "share_of_matrix_rate": count / taken / rate}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try this script out")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    if not given.small and not torch.cuda.is_available():
        parser.error("these measurements need a GPU, and torch sees none; --small tries the script out")
    ranks, size = launch.join(1), SMALL if given.small else LARGE
    bench = Bench(ranks.device, given.rounds, 256 if given.small else 8192)
    on_gpu = ranks.device.type == "cuda"
    card = torch.cuda.get_device_name() if on_gpu else "CPU"
    date = datetime.date.today().isoformat()
    output = given.output or RESULTS / f"gpu_{card.replace(' ', '-')}_{date}.json"
    found: dict[str, Any] = {"card": card, "date": date, "torch": torch.__version__, "rounds": given.rounds}
    found["training"] = training_step(bench, size, ranks)
    if on_gpu:
        found["memory"] = memory(size, ranks)
        torch.cuda.empty_cache()
    found["capture"] = capture(bench, size, ranks)
    output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
