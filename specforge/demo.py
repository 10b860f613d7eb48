"""The whole way on a small real model: every stage is the command that a user would type, shown before it runs."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from specforge import hardware
from specforge.config import DemoSettings
from specforge.console import console, say
from specforge.errors import ConfigError, EngineError
from specforge.files import write_json
from specforge.train.recipe import UPDATES

EXAMPLES = Path(__file__).parent.parent / "examples" / "conversations.jsonl"
DS_CONFIG = Path(__file__).parent.parent / "ds_config.json"
MODEL = Path("cache/models/SmolLM2-135M-Instruct")
STEPS = 7
MINUTES = 13  # by the estimate, without installation: 13.8 became 18.5 on two shared cores, whose rate varies


def run(settings: DemoSettings) -> None:
    if not EXAMPLES.is_file():
        raise ConfigError(
            "the demo's conversations are not here", where=str(EXAMPLES), fix="run it from a clone of the repository"
        )
    out = settings.output
    _clear(out, settings.fresh)
    size = _size(settings)
    seconds: dict[str, float] = {}
    began = time.perf_counter()
    _stage("convert target", ["-m", "specforge.target.gguf", str(MODEL)], seconds, log=out / "specforge.log")
    target = ["--model-path", str(MODEL)]
    _command(
        "prepare-data", [*target, "--dataset", str(EXAMPLES), "--output", f"{out}/data", "--test-share", "0.1"], seconds
    )
    if not settings.online:
        _command("prepare-hidden", [*target, "--data", f"{out}/data", "--output", f"{out}/features"], seconds)
    source = ["--online", "--data", f"{out}/data"] if settings.online else ["--features", f"{out}/features"]
    recipe = ["--epochs", str(size.epochs), "--draft-vocab-size", str(size.draft_vocab), "--steps", str(STEPS)]
    recipe += ["--row-tokens", str(size.row_tokens)] if size.row_tokens else []
    training = [*target, *source, "--output", f"{out}/draft", *recipe]
    _command("train", [*training, "--deepspeed-config", str(DS_CONFIG)], seconds)
    held_out = ["--data", f"{out}/data"] if settings.online else ["--features", f"{out}/features"]
    benchmark = [*target, "--draft", f"{out}/draft/best", *held_out, "--output", f"{out}/benchmark.json"]
    _command("benchmark", [*benchmark, "--num-prompts", "12", "--max-new-tokens", "64"], seconds)
    seconds["total"] = time.perf_counter() - began
    summary = summarise(out, settings.online, size, seconds)
    write_json(out / "summary.json", summary)
    _show(summary)
    say(f"written: {out}/summary.json, log of the engines: {out}/*/specforge.log")
    say("next: train a draft for your own target, see README.md, 'A first real run'")


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much the demo trains."""

    epochs: int
    draft_vocab: int
    row_tokens: int | None = None  # None: what `auto` chooses

    def seconds(self, rate: float, online: bool) -> float:
        """An estimate for a machine that does `rate` operations a second in a matrix product."""

        def of(part: str) -> float:
            fixed, operations = COSTS[part]
            return fixed + operations / rate

        steps = TOKENS * self.epochs / self.row_tokens if self.row_tokens else UPDATES
        a_pass = (0.14 + 0.86 * self.draft_vocab / 8192) * of("pass")
        captures = self.epochs if online else 1
        return of("rest") + of("benchmark") + captures * of("capture") + self.epochs * a_pass + steps * of("update")


# (seconds, operations) of each part, a line through two measurements: two cores with bf16 instructions, at 375 GFLOP/s,
# and without them, at 100 (benchmarks/LOG.md). "pass" is an epoch with a draft vocabulary of 8,192; with 4,096 it took
# 0.57 of that. TOKENS are those of the demo's training data.
COSTS = {
    "rest": (45, 0),
    "capture": (75, 7.5e12),
    "pass": (49, 9.1e12),
    "update": (0.12, 3.5e10),
    "benchmark": (62, 6.8e12),
}
TOKENS = 73_227
SIZES = (
    Size(epochs=5, draft_vocab=8192),
    Size(epochs=4, draft_vocab=8192),
    Size(epochs=3, draft_vocab=8192),
    Size(epochs=3, draft_vocab=4096),
    Size(epochs=2, draft_vocab=4096, row_tokens=1024),
)


def _size(settings: DemoSettings) -> Size:
    """The largest size that this machine does offline in MINUTES, else the smallest; what the user gives stays. Online
    takes longer for the same draft."""
    dtype = hardware.compute_dtype(torch.bfloat16)
    rate = matrix_rate(dtype)
    fitting = [size for size in SIZES if size.seconds(rate, online=False) < 60 * MINUTES]
    size = (fitting or SIZES[-1:])[0]
    given: dict[str, Any] = {"epochs": settings.epochs, "draft_vocab": settings.draft_vocab_size}
    size = replace(size, **{name: value for name, value in given.items() if value != "auto"})
    say(
        f"this machine: {rate / 1e9:.0f} GFLOP/s in {hardware.name(dtype)}; {size.epochs} epochs, draft vocabulary "
        f"{size.draft_vocab:,}: about {size.seconds(rate, settings.online) / 60:.0f} minutes"
    )
    return size


def matrix_rate(dtype: torch.dtype, seconds: float = 1.0) -> float:
    """Operations a second in a matrix product of the draft's size: the best of many, for other programs disturb it."""
    left, right = torch.randn(1024, 576, dtype=dtype), torch.randn(576, 4096, dtype=dtype)
    times: list[float] = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(times) < 3:
        began = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - began)
    return 2 * left.numel() * right.shape[1] / min(times)


def summarise(out: Path, online: bool, size: Size, seconds: dict[str, float]) -> dict[str, Any]:
    lines = [json.loads(line) for line in (out / "draft" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluations = [line["held_out"] for line in lines if "held_out" in line]
    steps = [line for line in lines if "tokens_per_second" in line]
    result = json.loads((out / "benchmark.json").read_text(encoding="utf-8"))
    forced, decoded = result["teacher_forced"], result["decode"]
    return {
        "engine": decoded["engine"],
        "mode": "online" if online else "offline",
        **asdict(size),
        "acceptance_length_before": evaluations[0]["acceptance_length"],
        "acceptance_length_after": forced["acceptance_length"],
        "walk_length_after": forced["walk_length"],
        "acceptance_by_position": forced["acceptance_by_position"],
        "held_out_predictions": forced["predictions"],
        "draft_vocabulary_coverage": forced["coverage"],
        "decode_acceptance_length": decoded["acceptance_length"],
        "greedy_lossless": decoded["greedy_lossless"],
        "decode": decoded,
        "training_tokens_per_second": sorted(line["tokens_per_second"] for line in steps)[len(steps) // 2],
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }


def _clear(out: Path, fresh: bool) -> None:
    if out.exists() and any(out.iterdir()):
        known = {"data", "features", "draft", "benchmark.json", "summary.json", "specforge.log"}
        foreign = {entry.name for entry in out.iterdir()} - known
        if foreign:
            raise ConfigError(
                f"the output folder holds something else: {', '.join(sorted(foreign)[:3])}",
                where=f"--output {out}",
                fix="choose a new or empty folder",
            )
        if fresh:
            shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)


def _command(name: str, arguments: list[str], seconds: dict[str, float]) -> None:
    _stage(name, ["-m", "specforge.cli", name, *arguments], seconds)


def _stage(name: str, arguments: list[str], seconds: dict[str, float], log: Path | None = None) -> None:
    """Run Python with these arguments; with `log`, what it says goes there."""
    shown = " ".join(arguments[1:]).replace("specforge.cli", "specforge")
    console.print(f"\n[bold cyan]$ {shown}[/]" if "specforge.cli" in arguments else f"\n[bold cyan]# {name}[/]")
    began = time.perf_counter()
    with log.open("ab") if log else contextlib.nullcontext() as file:
        code = subprocess.run([sys.executable, *arguments], check=False, stdout=file, stderr=file).returncode
    seconds[name.replace(" ", "_").replace("-", "_")] = time.perf_counter() - began
    if code:
        raise EngineError(
            f"the stage '{name}' ended with code {code}",
            where=shown,
            fix=f"its own message stands {f'in {log}' if log else 'above'}",
        )


def _show(summary: dict[str, Any]) -> None:
    table = Table(
        "acceptance length", "before", "after", title=f"SmolLM2-135M-Instruct, {summary['mode']}", min_width=60
    )
    before, after = summary["acceptance_length_before"], summary["acceptance_length_after"]
    table.add_row("teacher-forced, held-out, 7 steps", f"{before:.2f}", f"[bold green]{after:.2f}[/]")
    table.add_row("walk through the same turns", "", f"{summary['walk_length_after']:.2f}")
    lossless = "text equals plain greedy" if summary["greedy_lossless"] else "TEXT DIFFERS"
    table.add_row(f"real decoding ({lossless})", "", f"{summary['decode_acceptance_length']:.2f}")
    console.print(table)
    console.print("seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in summary["seconds"].items()))
