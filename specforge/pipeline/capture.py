"""The target's hidden states for every token, into a store for each split."""

from __future__ import annotations

import torch.distributed as dist

from specforge import launch
from specforge.alignment import teacher_rows
from specforge.config import (
    PrepareHiddenSettings,
)
from specforge.console import advance, is_main_rank, progress, say
from specforge.data import prepared
from specforge.data.tokenize import ChatTokenizer
from specforge.errors import StoreError
from specforge.features.codec import codec_for
from specforge.features.index import Manifest, check_space, committed_ids, existing, held_bytes, refuse_busy
from specforge.features.packing import in_batches
from specforge.features.shard import record_bytes
from specforge.features.store import Store
from specforge.features.writer import StoreWriter, fitting
from specforge.pipeline.shared import check_lengths, leave, refuse_foreign, start_engine
from specforge.records import Example, Ranks, TargetEngine
from specforge.target import engine as engines
from specforge.target import weights


def prepare_hidden(settings: PrepareHiddenSettings) -> int | None:
    info = weights.describe(settings.model_path, settings.trust_remote_code)
    engines.check_tp(info, settings.tp_size, settings.engine)
    layers = engines.aux_layers_of(settings, info)
    tokenizer = ChatTokenizer(settings.model_path, settings.chat_template, settings.trust_remote_code)
    splits = prepared.load_splits(settings.data, tokenizer, settings.max_length, settings.num_samples)
    check_lengths(splits, settings.tokens_per_batch)
    dtype = info.dtype if settings.dtype == "auto" else engines.DTYPES[settings.dtype]
    manifests = {
        name: Manifest(
            target=settings.model_path,
            target_fingerprint=info.fingerprint,
            tokenizer_hash=tokenizer.fingerprint,
            template_hash=tokenizer.template_fingerprint,
            aux_layers=layers,
            data_hash=prepared.data_hash(examples),
            max_length=settings.max_length,
            codec=codec_for(settings.codec, dtype),
            dtype=str(dtype).removeprefix("torch."),
            hidden_size=info.hidden_size,
            num_records=len(examples),
            tokens_per_batch=settings.tokens_per_batch,
            engine=engines.choose(settings.engine),
        )
        for name, examples in splits.items()
    }
    if not launch.is_rank():  # the parent checks before it starts ranks, and before a model is loaded
        refuse_foreign(settings.output, *splits)
        needed = 0
        for name, examples in splits.items():
            existing(settings.output / name, manifests[name])
            refuse_busy(settings.output / name)
            done = committed_ids(settings.output / name)
            needed += sum(_bytes(manifests[name], example) for example in examples if example.sample_id not in done)
        check_space(settings.output, min(needed, settings.max_disk or needed))
        code = launch.start_ranks(settings.tp_size)
        if code is not None:
            return code
    ranks = launch.join(settings.tp_size)
    planned = [found.tokens_per_batch for n in splits if (found := existing(settings.output / n, manifests[n]))]
    most = max([settings.tokens_per_batch, *planned])  # a store that is gone on with keeps its batches
    settings = settings.model_copy(update={"tokens_per_batch": most})
    engine = start_engine(settings, info, ranks, settings.output)
    for name, examples in splits.items():
        _capture_split(engine, examples, manifests[name], settings, name, ranks)
    if is_main_rank():
        size = sum(Store(settings.output / name).bytes() for name in splits)
        say(f"features: {size / 1e6:,.0f} MB in {settings.output}")
        say(f"next: specforge train --features {settings.output} --model-path {settings.model_path}")
    leave(ranks)
    return None


def _capture_split(
    engine: TargetEngine,
    examples: list[Example],
    manifest: Manifest,
    settings: PrepareHiddenSettings,
    name: str,
    ranks: Ranks,
) -> None:
    """The planned batches go round the replicas; each rank of one writes every tp-th record of its batches."""
    folder, shard_bytes = settings.output / name, settings.shard_mb << 20
    if ranks.rank > 0:
        dist.barrier()  # writer 0 comes first
    writer = StoreWriter(folder, manifest, ranks.rank, shard_bytes)
    if ranks.rank == 0:
        dist.barrier()
    held = sum(held_bytes(store) for store in settings.output.iterdir() if store.is_dir())
    dist.barrier()  # all ranks have read the same index before any of them adds to it
    lengths = [len(example.token_ids) for example in examples]
    batches = in_batches(lengths, writer.manifest.tokens_per_batch)
    todo = [b for b in batches if not all(examples[at].sample_id in writer.committed for at in b)]
    if len(todo) < len(batches):
        say(f"{name}: going on, {len(batches) - len(todo)} of {len(batches)} batches are in the store")
    fit = len(todo)
    if settings.max_disk is not None:
        sizes = [sum(_bytes(manifest, examples[at]) for at in batch) for batch in todo]
        fit = fitting(sizes, settings.max_disk - held, ranks.world, shard_bytes)
    mine = todo[:fit][ranks.replica :: ranks.replicas]
    with writer, progress(f"capturing {name}", sum(lengths[at] for batch in mine for at in batch), "tokens") as bar:
        for batch in mine:
            records = engine.capture([examples[at] for at in batch])
            for record in records[ranks.tp_rank :: ranks.tp_size]:
                writer.add(record)
            advance(bar, sum(lengths[at] for at in batch))
    dist.barrier()
    if fit < len(todo):
        raise StoreError(
            f"stopped at the limit of the disk: {len(batches) - len(todo) + fit} of {len(batches)} batches of {name} "
            "are in the store",
            where=f"--max-disk {settings.max_disk}",
            fix="raise it: the same command then goes on",
        )


def _bytes(manifest: Manifest, example: Example) -> int:
    teachers = len(teacher_rows(example.loss_mask))
    return record_bytes(manifest.codec, manifest.hidden_size, len(example.token_ids), teachers)
