"""The target's hidden states for every token, into a store for each split."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import numpy as np
import torch
import torch.distributed as dist

from specforge import launch
from specforge.alignment import teacher_rows
from specforge.config import PrepareHiddenSettings
from specforge.console import advance, is_main_rank, progress, say
from specforge.data import prepared
from specforge.data.tokenize import ChatTokenizer
from specforge.errors import ConfigError, StoreError
from specforge.features import aside
from specforge.features.index import Manifest, check_space, committed_ids, existing, held_bytes, refuse_busy
from specforge.features.packing import in_batches
from specforge.features.passes import Passes
from specforge.features.shard import record_bytes
from specforge.features.store import Store
from specforge.features.writer import StoreWriter, fitting
from specforge.pipeline.planning import write_rate
from specforge.pipeline.shared import (
    check_lengths,
    leave,
    manifest_of,
    refuse_foreign,
    say_set_aside,
    start_engine,
    watched,
)
from specforge.records import Example, Ranks, TargetEngine
from specforge.target import engine as engines
from specforge.target import weights

Splits = dict[str, list[Example]]


def prepare_hidden(settings: PrepareHiddenSettings) -> int | None:
    info = weights.describe(settings.model_path, settings.trust_remote_code)
    engines.check_tp(info, settings.tp_size, settings.engine)
    layers = engines.aux_layers_of(settings, info)
    tokenizer = ChatTokenizer(settings.model_path, settings.chat_template, settings.trust_remote_code)
    splits = prepared.load_splits(settings.data, tokenizer, settings, settings.num_samples)
    check_lengths(splits, settings.tokens_per_batch)
    manifests = {name: manifest_of(settings, info, layers, tokenizer, found) for name, found in splits.items()}
    if not launch.is_rank():  # the parent checks before it starts ranks, and before a model is loaded
        _check_output(settings, splits, manifests)
        code = launch.start_ranks(settings.tp_size, dp_size=settings.dp_size)
        if code is not None:
            return code
    ranks = launch.join(settings.tp_size, settings.dp_size)
    planned = [found.tokens_per_batch for n in splits if (found := existing(settings.output / n, manifests[n]))]
    most = max([settings.tokens_per_batch, *planned])  # a store that is gone on with keeps its batches
    engine = start_engine(settings.model_copy(update={"tokens_per_batch": most}), info, ranks, settings.output)
    room = _room(engine, ranks)
    _check_room(room, splits, planned)
    budget = min(settings.tokens_per_batch, room)
    began, tokens = time.monotonic(), 0
    with watched(ranks, settings.rank_timeout, engine):
        for name, examples in splits.items():
            manifest = replace(manifests[name], tokens_per_batch=budget)
            tokens += _capture_split(engine, examples, manifest, settings, name, ranks)
    if is_main_rank():
        if tokens:
            rate = tokens / (time.monotonic() - began) / ranks.replicas
            write_rate(settings.output, info, rate, settings.tp_size, ranks.device)
        _say_result(settings, splits)
    leave(ranks)
    return None


def _check_output(settings: PrepareHiddenSettings, splits: Splits, manifests: dict[str, Manifest]) -> None:
    refuse_foreign(settings.output, *splits)
    needed = 0
    for name, examples in splits.items():
        existing(settings.output / name, manifests[name])
        refuse_busy(settings.output / name)
        done = committed_ids(settings.output / name)
        needed += sum(_bytes(manifests[name], example) for example in examples if example.sample_id not in done)
    check_space(settings.output, min(needed, settings.max_disk or needed))


def _bytes(manifest: Manifest, example: Example) -> int:
    teachers = len(teacher_rows(example.loss_mask))
    return record_bytes(manifest.codec, manifest.hidden_size, len(example.token_ids), teachers)


def _room(engine: TargetEngine, ranks: Ranks) -> int:
    """Tokens of one pass that every replica's KV cache holds: the batches must be the same on all of them."""
    room = torch.tensor(engine.tokens_per_batch, device=ranks.device)
    dist.all_reduce(room, dist.ReduceOp.MIN)
    return int(room)


def _check_room(room: int, splits: Splits, planned: Sequence[int]) -> None:
    fix = "raise --mem-frac or --tp-size, or lower --max-length"
    longest = max(len(example.token_ids) for examples in splits.values() for example in examples)
    if longest > room:
        raise ConfigError(
            f"the longest conversation has {longest} tokens, the memory left for the KV cache holds {room}",
            where="--mem-frac, --max-length",
            fix=fix,
        )
    if planned and max(planned) > room:
        raise ConfigError(
            f"the store was begun with passes of {max(planned)} tokens, the memory left for the KV cache holds {room}",
            where="manifest.json of the store, 'tokens_per_batch'",
            fix=f"{fix}; or choose another --output",
        )


def _capture_split(
    engine: TargetEngine,
    examples: Sequence[Example],
    manifest: Manifest,
    settings: PrepareHiddenSettings,
    name: str,
    ranks: Ranks,
) -> int:
    """Each planned batch goes to the replica that is free first; each rank of it writes every tp-th of the records.
    Returns the tokens captured, by all replicas."""
    folder, shard_bytes = settings.output / name, settings.shard_mb << 20
    if ranks.rank > 0:
        dist.barrier()  # writer 0 comes first
    writer = StoreWriter(folder, manifest, ranks.rank, shard_bytes)
    if ranks.rank == 0:
        dist.barrier()
    aside.check_share(folder, len(examples))
    held = sum(held_bytes(store) for store in settings.output.iterdir() if store.is_dir())
    finished = writer.committed | aside.reasons(folder).keys()
    dist.barrier()  # all ranks have read the same index before any of them adds to it
    lengths = np.array([len(example.token_ids) for example in examples])
    batches = in_batches(lengths, writer.manifest.tokens_per_batch)
    todo = [batch for batch in batches if not all(examples[at].sample_id in finished for at in batch)]
    if len(todo) < len(batches):
        say(f"{name}: going on, {len(batches) - len(todo)} of {len(batches)} batches are in the store")
    fit = len(todo)
    if settings.max_disk is not None:
        sizes = [sum(_bytes(manifest, examples[at]) for at in batch) for batch in todo]
        fit = fitting(sizes, settings.max_disk - held, ranks.world, shard_bytes)
    until = np.cumsum([0, *(int(lengths[batch].sum()) for batch in todo[:fit])])
    passes, shown = Passes(engine, examples), 0
    with writer, progress(f"capturing {name}", int(until[-1]), "tokens") as bar:
        for number in launch.claimed(fit, ranks, f"capture/{name}"):
            for captured in passes.run(todo[number]):
                for at, found in islice(captured, ranks.tp_rank, None, ranks.tp_size):
                    if isinstance(found, str):
                        aside.set_aside(folder, examples[at].sample_id, found, len(examples))
                    else:
                        writer.add(found)
            advance(bar, int(until[number + 1]) - shown)  # all before it is done, or in work on another replica
            shown = int(until[number + 1])
        advance(bar, int(until[-1]) - shown)
    dist.barrier()
    if fit < len(todo):
        raise StoreError(
            f"stopped at the limit of the disk: {len(batches) - len(todo) + fit} of {len(batches)} batches of {name} "
            "are in the store",
            where=f"--max-disk {settings.max_disk}",
            fix="raise it: the same command then goes on",
        )
    return int(until[-1])


def _say_result(settings: PrepareHiddenSettings, splits: Splits) -> None:
    size = 0
    for name in splits:
        folder = settings.output / name
        size += Store(folder).bytes()
        say_set_aside(name, folder)
    say(f"features: {size / 1e6:,.0f} MB in {settings.output}")
    say(f"next: specforge train --features {settings.output} --model-path {settings.model_path}")
