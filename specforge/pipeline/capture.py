"""The target's hidden states for every token, into a store for each split."""

from __future__ import annotations

import torch
import torch.distributed as dist

from specforge import launch
from specforge.config import (
    PrepareHiddenSettings,
)
from specforge.console import advance, is_main_rank, progress, say
from specforge.data import prepared
from specforge.data.tokenize import ChatTokenizer
from specforge.features.codec import codec_for
from specforge.features.packing import in_batches
from specforge.features.store import Manifest, Store, StoreWriter, check_space, committed_ids, existing
from specforge.pipeline.shared import check_lengths, leave, refuse_foreign, start_engine
from specforge.records import Example, Ranks, TargetEngine
from specforge.target import engine as engines
from specforge.target import weights


def prepare_hidden(settings: PrepareHiddenSettings) -> int | None:
    info = weights.describe(settings.model_path, settings.trust_remote_code)
    engines.check_tp(info, settings.tp_size, settings.engine)
    layers = engines.aux_layers_of(settings, info)
    tokenizer = ChatTokenizer(settings.model_path, settings.chat_template, settings.trust_remote_code)
    splits = prepared.load_splits(settings.data, tokenizer, settings, settings.num_samples)
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
            codec=codec_for(dtype),
            hidden_size=info.hidden_size,
            num_records=len(examples),
            tokens_per_batch=settings.tokens_per_batch,
            engine=engines.choose(settings.engine),
        )
        for name, examples in splits.items()
    }
    if not launch.is_rank():  # the parent checks before it starts ranks, and before a model is loaded
        refuse_foreign(settings.output, *splits)
        tokens = 0
        for name, examples in splits.items():
            existing(settings.output / name, manifests[name])
            done = committed_ids(settings.output / name)
            tokens += sum(len(example.token_ids) for example in examples if example.sample_id not in done)
        check_space(settings.output, tokens * info.hidden_size * 4 * (4 if dtype == torch.float32 else 2))
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
    folder = settings.output / name
    if ranks.rank == 0:
        StoreWriter(folder, manifest)
    dist.barrier()
    writer = StoreWriter(folder, manifest, ranks.rank, settings.shard_mb << 20)
    dist.barrier()  # all ranks have read the same index before any of them adds to it
    lengths = [len(example.token_ids) for example in examples]
    batches = in_batches(lengths, writer.manifest.tokens_per_batch)[ranks.replica :: ranks.replicas]
    todo = [b for b in batches if not all(examples[at].sample_id in writer.committed for at in b)]
    if len(todo) < len(batches):
        say(f"{name}: going on, {len(batches) - len(todo)} of {len(batches)} batches are in the store")
    with progress(f"capturing {name}", sum(lengths[at] for batch in todo for at in batch), "tokens") as bar:
        for batch in todo:
            records = engine.capture([examples[at] for at in batch])
            for record in records[ranks.tp_rank :: ranks.tp_size]:
                writer.add(record)
            advance(bar, sum(lengths[at] for at in batch))
    writer.close()
    dist.barrier()
