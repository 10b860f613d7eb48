"""What several commands share: starting the engine, refusing what does not fit, the last lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from specforge import console, hardware, launch
from specforge.config import PrepareHiddenSettings, TrainSettings
from specforge.console import is_main_rank, say, show_error
from specforge.data import prepared
from specforge.data.tokenize import ChatTokenizer
from specforge.errors import ConfigError, SpecforgeError, StoreError
from specforge.evaluate.launched import arguments, command_line
from specforge.evaluate.shape import Shape
from specforge.features import aside
from specforge.features.codec import codec_for
from specforge.features.index import Manifest
from specforge.features.store import Store
from specforge.records import Example, Ranks, TargetEngine, TargetInfo
from specforge.target import engine as engines
from specforge.watch import Watch


def start_engine(settings: Any, info: TargetInfo, ranks: Ranks, log_folder: Path) -> TargetEngine:
    console.quiet(log_folder / log_name())
    engine = engines.load(settings, info, ranks)
    dtype = hardware.described(engine.dtype, info.dtype, ranks.device)
    say(f"target {info.path} in {engine.name}, {dtype}, {ranks.world} rank(s), tensor parallel {ranks.tp_size}")
    if not engine.serves_eagle3:
        kind = info.config.get("model_type")
        say(f"[yellow]note[/] SGLang has no EAGLE-3 for {kind}: a draft can be trained, but not served there")
    return engine


def drafting_dtype(info: TargetInfo, engine: TargetEngine | None, ranks: Ranks) -> torch.dtype:
    """The dtype of a draft that is measured: bf16, or float32 with a target in float32 or on a CPU without bf16."""
    wide = torch.float32 in (info.dtype, engine.dtype if engine else None)
    return torch.float32 if wide else hardware.compute_dtype(torch.bfloat16, ranks.device)


@contextmanager
def watched(ranks: Ranks, timeout_s: float, engine: TargetEngine | None = None) -> Iterator[Watch]:
    """What all ranks do together, after each has loaded what it needs: see Watch. Passes of the engine are beats."""
    dist.barrier()  # who still loads is not silent
    with Watch((ranks.rank, ranks.world), launch.board(), timeout_s, _tell) as watch:
        if engine is not None:
            engine.on_pass = watch.beat
        yield watch
        dist.barrier()  # who has done his part no longer looks for the others


def _tell(error: SpecforgeError, surely: bool) -> None:
    if surely or launch.speaks():
        show_error(str(error))


def log_name() -> str:
    return "specforge.log" if is_main_rank() else f"specforge-rank{dist.get_rank()}.log"


def leave(ranks: Ranks) -> None:
    dist.barrier()
    dist.destroy_process_group()


def refuse_foreign(folder: Path, *own: str) -> None:
    """An output folder may be new, empty, or ours (it holds one of `own`); anything else is not touched."""
    found = folder.iterdir() if folder.exists() else []
    held = {entry.name for entry in found if entry.suffix != ".log" and not entry.name.startswith(".")}
    if held and not held & set(own):
        raise ConfigError(
            "the output folder holds something else", where=f"--output {folder}", fix="choose a new or empty folder"
        )


def say_set_aside(split: str, folder: Path) -> None:
    for reason, count in Counter(aside.reasons(folder).values()).items():
        say(f"{split}: {count} records set aside ({reason}), listed in {folder / aside.SET_ASIDE}")


def check_lengths(splits: dict[str, list[Example]], tokens_per_batch: int) -> None:
    longest = max(len(example.token_ids) for examples in splits.values() for example in examples)
    if longest > tokens_per_batch:
        raise ConfigError(
            f"the longest conversation has {longest} tokens, more than one pass of the target takes",
            where=f"--tokens-per-batch {tokens_per_batch}",
            fix=f"raise it to at least {longest}, or lower --max-length",
        )


def check_target(store: Store, info: TargetInfo) -> None:
    if store.manifest.target_fingerprint != info.fingerprint:
        raise StoreError(
            f"the store was captured from another target ({store.manifest.target}), not from {info.path}",
            where=f"{store.folder}/manifest.json, 'target_fingerprint'",
            fix="give that target with --model-path, or capture again with `specforge prepare-hidden`",
        )


SERVED_STEPS = 3  # of a chain, where nothing was measured: what usually pays


def say_serving(draft: Path, model_path: str, shape: Shape) -> None:
    say(f"draft: {draft}")
    say(f"serve it: {command_line(arguments(model_path, str(draft), shape))}")


def manifest_of(
    settings: PrepareHiddenSettings | TrainSettings,
    info: TargetInfo,
    layers: tuple[int, ...],
    tokenizer: ChatTokenizer,
    examples: Sequence[Example],
) -> Manifest:
    dtype = engines.dtype_of(settings, info)
    return Manifest(
        target=info.path if settings.model_path is None else settings.model_path,
        target_fingerprint=info.fingerprint,
        tokenizer_hash=tokenizer.fingerprint,
        template_hash=tokenizer.template_fingerprint,
        aux_layers=layers,
        data_hash=prepared.data_hash(examples),
        max_length=settings.max_length,
        codec=codec_for(settings.codec, info.dtype if settings.dtype == "auto" else dtype),
        dtype=hardware.name(dtype),
        hidden_size=info.hidden_size,
        num_records=len(examples),
        tokens_per_batch=settings.tokens_per_batch,
        engine=engines.choose(settings.engine),
    )
