"""What a draft is worth: teacher-forced acceptance and real decoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.markup import escape
from rich.table import Table

from specforge import launch
from specforge.config import BenchmarkSettings
from specforge.console import console, is_main_rank, say
from specforge.data import prepared, questions
from specforge.data.tokenize import ChatTokenizer
from specforge.draft import folder as draft_folder
from specforge.errors import CheckpointError, ConfigError, StoreError
from specforge.evaluate.acceptance import teacher_forced
from specforge.evaluate.drafter import Drafting
from specforge.evaluate.figures import figures
from specforge.evaluate.kinds import side_by_side
from specforge.evaluate.shape import Shape
from specforge.features.packing import pack_rows
from specforge.features.sources import LiveSource, StoreSource, held_out_batches
from specforge.features.store import Store
from specforge.files import write_json
from specforge.pipeline.decoding import check_room, decoding, shape_of, shapes_of
from specforge.pipeline.shared import (
    SERVED_STEPS,
    check_lengths,
    check_target,
    drafting_dtype,
    leave,
    say_serving,
    start_engine,
    watched,
)
from specforge.records import Example, Ranks, RecordSource, TargetEngine
from specforge.target import engine as engines
from specforge.target import weights

SHAPE = ("steps", "top_k", "draft_tokens")


def benchmark(settings: BenchmarkSettings) -> int | None:
    assert settings.draft is not None  # `serving` has checked them
    assert settings.model_path is not None
    config = draft_folder.load(settings.draft, torch.float32)[0].config
    shape = shape_of(settings, config.draft_vocab_size)
    info = weights.describe(settings.model_path, settings.trust_remote_code)
    if config.target_fingerprint not in ("", info.fingerprint):
        raise CheckpointError(
            "the draft was trained for another target",
            where=f"{settings.draft}/config.json, 'specforge.target_fingerprint'",
            fix="give the draft's own target with --model-path",
        )
    if settings.features is None and settings.data is None:
        raise ConfigError(
            "there is no held-out text", where="--features, --data", fix="give one of them: a store, or prepared data"
        )
    engines.check_tp(info, settings.tp_size, settings.engine)
    asked = questions.load(settings.questions, settings.num_prompts) if settings.questions else []
    tokenizer = ChatTokenizer(settings.model_path, settings.chat_template, settings.trust_remote_code)
    store = Store(settings.features / "test", settings.verify) if settings.features else None
    if store:
        check_target(store, info)
        if store.manifest.aux_layers != config.aux_layers:
            raise StoreError(
                f"the store holds aux layers {store.manifest.aux_layers}, the draft reads {config.aux_layers}",
                where=f"{store.folder}/manifest.json, 'aux_layers'",
                fix=f"capture with --aux-layers {' '.join(map(str, config.aux_layers))}",
            )
    code = launch.start_ranks(settings.tp_size, replicas=False)
    if code is not None:
        return code
    ranks = launch.join(settings.tp_size)
    engine: TargetEngine | None = None
    if store is None or settings.num_prompts:
        own_layers = settings.model_copy(update={"aux_layers": config.aux_layers})
        engine = start_engine(own_layers, info, ranks, settings.output.parent if settings.output else Path("."))
    source, prompts, domains = _held_out(settings, store, engine, tokenizer, ranks)
    if asked:
        prompts = [tokenizer.prompt_ids(questions.first_turn(question)) for question in asked]
    chosen = [prompt for prompt in prompts if prompt][: settings.num_prompts]
    if chosen and engine is not None:
        check_room(settings, engine, chosen, shapes_of(settings, shape, config.draft_vocab_size))

    dtype = drafting_dtype(info, engine, ranks)
    draft, kept_D = draft_folder.load(settings.draft, dtype)
    drafting = Drafting(
        draft=draft.to(ranks.device).eval(),
        embedding_VH=weights.load_head(info, dtype).embedding_VH.to(ranks.device),
        kept_D=kept_D.to(ranks.device),
        shape=shape,
    )
    rows = pack_rows(source.lengths, settings.max_length, seed=0, epoch=0)
    with watched(ranks, settings.rank_timeout, engine) as watch:
        forced = teacher_forced(
            drafting.draft,
            drafting.embedding_VH,
            drafting.kept_D,
            watch.over(held_out_batches(source, rows, ranks, dtype)),
            settings.steps,
            calibrate=True,
        )
        said = figures(forced, domains)
        _show(said)
        result: dict[str, Any] = {
            "draft": str(settings.draft),
            "target": settings.model_path,
            "steps": settings.steps,
            "questions": settings.questions,
            "teacher_forced": said,
        }
        if chosen and engine is not None:
            topics = [question.domain for question in asked]
            result |= decoding(settings, engine, drafting, chosen, tokenizer.stop_ids(), topics)
            result |= side_by_side(result)
    if settings.output and is_main_rank():
        write_json(settings.output, result)
    if not result.get("decode", {}).get("greedy_lossless", True):
        say("[bold red]the decoded text differs from plain greedy decoding[/]: please report this")
        return 1
    best = result.get("best")
    served = Shape(**{name: best[name] for name in SHAPE}) if best else Shape.chain(min(settings.steps, SERVED_STEPS))
    say_serving(settings.draft, settings.model_path, served)
    leave(ranks)
    return None


def _held_out(
    settings: BenchmarkSettings,
    store: Store | None,
    engine: TargetEngine | None,
    tokenizer: ChatTokenizer,
    ranks: Ranks,
) -> tuple[RecordSource, list[list[int]], dict[int, str]]:
    """(features of the held-out split, its prompts, domains of its samples), from the store or captured live."""
    if store is not None:
        given = prepared.load_held_out(settings.data, tokenizer, _as_captured(settings, store)) if settings.data else []
        tokens, prompts = dict[int, NDArray[np.int32]](), list[list[int]]()
        for index in range(len(store)):
            record = store.record(index)
            tokens[record.sample_id] = record.token_ids.numpy()
            prompts.append(_prompt(record.token_ids.numpy(), record.loss_mask.numpy()))
        return StoreSource(store, ranks.tp_rank, ranks.device), prompts, _domains(given, tokens)
    assert settings.data is not None
    assert engine is not None
    examples = prepared.load_held_out(settings.data, tokenizer, settings)
    check_lengths({"test": examples}, settings.tokens_per_batch)
    prompts = [_prompt(example.token_ids, example.loss_mask) for example in examples]
    domains = {example.sample_id: example.domain for example in examples if example.domain}
    return LiveSource(engine, examples, ranks.tp_rank), prompts, domains


def _as_captured(settings: BenchmarkSettings, store: Store) -> BenchmarkSettings:
    return settings.model_copy(update={"max_length": store.manifest.max_length})


def _domains(given: Sequence[Example], tokens: Mapping[int, NDArray[np.int32]]) -> dict[int, str]:
    """Of the store's samples, by what --data says of them: the store knows their ids and tokens only. {} where the data
    is not what the store was made from."""
    named = {example.sample_id: example for example in given}
    if given and not all(s in named and np.array_equal(named[s].token_ids, ids) for s, ids in tokens.items()):
        say("[yellow]note[/] the store was not made from --data, or with other flags: acceptance is not said by domain")
        return {}
    return {sample: named[sample].domain for sample in tokens if sample in named and named[sample].domain}


def _show(said: Mapping[str, Any]) -> None:
    """The teacher-forced figures, for a person."""
    length = _with_interval(said["acceptance_length"], said["intervals"][-1])
    walk = _with_interval(said["walk_length"], said["walk_interval"])
    say(
        f"teacher-forced acceptance length {length}, walk {walk}, over {said['predictions']:,} held-out predictions in "
        f"{said['conversations']:,} conversations, {len(said['lengths'])} steps"
    )
    say("by number of steps: " + ", ".join(f"{k}: {length:.2f}" for k, length in enumerate(said["lengths"], 1)))
    say(
        f"the draft vocabulary holds {said['coverage']:.1%} of the target's choices; calibration error "
        f"{said['calibration_error']:.3f}"
    )
    if "by_domain" not in said or not is_main_rank():
        return
    table = Table("domain", title="acceptance length by domain", title_justify="left")
    for name in ("conversations", "predictions", "length", "95 %", "first draft"):
        table.add_column(name, justify="right")
    for name, part in said["by_domain"].items():
        low, high = part["interval"]
        counts = f"{part['conversations']:,}", f"{part['predictions']:,}"
        first = f"{part['acceptance_by_position'][0]:.1%}"
        table.add_row(escape(name), *counts, f"{part['acceptance_length']:.3f}", f"{low:.2f} .. {high:.2f}", first)
    console.print(table)


def _with_interval(value: float, interval: Sequence[float]) -> str:
    return f"{value:.3f} ({interval[0]:.2f} .. {interval[1]:.2f})"


def _prompt(token_ids: Any, loss_mask: Any) -> list[int]:
    """Tokens before the first supervised one."""
    return [int(token) for token in token_ids[: int(np.argmax(loss_mask))]]
