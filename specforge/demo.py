"""The whole way on a small real model: every stage is the command that a user would type, shown before it runs."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.table import Table

from specforge.config import DemoSettings
from specforge.console import console, say
from specforge.errors import ConfigError, EngineError
from specforge.files import write_json

EXAMPLES = Path(__file__).parent.parent / "examples" / "conversations.jsonl"
DS_CONFIG = Path(__file__).parent.parent / "ds_config.json"
MODEL = Path("cache/models/SmolLM2-135M-Instruct")
RECIPE = {  # for 50,000 supervised tokens and a target of 135 M parameters on a CPU; see docs/training.md
    "draft-vocab-size": 8192,
    "steps": 7,
}


def run(settings: DemoSettings) -> None:
    if not EXAMPLES.is_file():
        raise ConfigError(
            "the demo's conversations are not here", where=str(EXAMPLES), fix="run it from a clone of the repository"
        )
    out = settings.output
    _clear(out, settings.fresh)
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
    recipe = [text for name, value in RECIPE.items() for text in (f"--{name}", str(value))]
    training = [*target, *source, "--output", f"{out}/draft", "--epochs", str(settings.epochs), *recipe]
    _command("train", [*training, "--deepspeed-config", str(DS_CONFIG)], seconds)
    held_out = ["--data", f"{out}/data"] if settings.online else ["--features", f"{out}/features"]
    benchmark = [*target, "--draft", f"{out}/draft/best", *held_out, "--output", f"{out}/benchmark.json"]
    _command("benchmark", [*benchmark, "--num-prompts", "12", "--max-new-tokens", "64"], seconds)
    seconds["total"] = time.perf_counter() - began
    summary = summarise(out, settings.online, seconds)
    write_json(out / "summary.json", summary)
    _show(summary)
    say(f"written: {out}/summary.json, log of the engines: {out}/*/specforge.log")
    say("next: train a draft for your own target, see README.md, 'A first real run'")


def summarise(out: Path, online: bool, seconds: dict[str, float]) -> dict[str, Any]:
    lines = [json.loads(line) for line in (out / "draft" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluations = [line["held_out"] for line in lines if "held_out" in line]
    steps = [line for line in lines if "tokens_per_second" in line]
    result = json.loads((out / "benchmark.json").read_text(encoding="utf-8"))
    forced, decoded = result["teacher_forced"], result["decode"]
    return {
        "engine": decoded["engine"],
        "mode": "online" if online else "offline",
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
