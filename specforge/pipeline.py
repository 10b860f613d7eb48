"""One short function a command: the only place where sibling folders meet. Each returns its exit code (None is 0)."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from specforge import console, launch
from specforge import demo as demonstration
from specforge import doctor as doctoring
from specforge.config import (
    BenchmarkSettings,
    DemoSettings,
    DoctorSettings,
    PrepareDataSettings,
    PrepareHiddenSettings,
    RegenerateSettings,
    TrainSettings,
)
from specforge.console import advance, is_main_rank, progress, say
from specforge.data import formats, prepared, vocab
from specforge.data import regenerate as regeneration
from specforge.data import split as splitting
from specforge.data.tokenize import ChatTokenizer, require_supervised
from specforge.draft import folder as draft_folder
from specforge.draft.model import DraftConfig, Eagle3Draft
from specforge.draft.step import DraftStep
from specforge.errors import CheckpointError, ConfigError, StoreError
from specforge.evaluate import decode
from specforge.evaluate.acceptance import teacher_forced
from specforge.features.codec import codec_for
from specforge.features.packing import in_batches, pack_rows, share_out
from specforge.features.sources import LiveSource, StoreSource, held_out_batches
from specforge.features.store import Manifest, Store, StoreWriter, check_space
from specforge.files import replacing, write_json
from specforge.records import Acceptance, Example, Ranks, RecordSource, TargetEngine, TargetInfo
from specforge.target import engine as engines
from specforge.target import weights
from specforge.train import checkpoint
from specforge.train.loop import Run, Slots
from specforge.train.loop import train as run_training
from specforge.train.optimizer import DraftOptimizer, deepspeed_config


def prepare_data(settings: PrepareDataSettings) -> int | None:
    _refuse_foreign(settings.output, "report.json")
    tokenizer = None
    if settings.model_path:
        tokenizer = ChatTokenizer(settings.model_path, settings.chat_template, settings.trust_remote_code)
    report = formats.ReadReport()
    read = formats.read_conversations(Path(settings.dataset), report)
    unique = splitting.without_exact_duplicates(read)
    train, test = splitting.split(unique, settings.test_share, settings.seed)
    clean = splitting.without_leaks(train, test)
    report.dropped["exact duplicate"] = len(read) - len(unique)
    report.dropped["near-duplicate of a held-out conversation"] = len(train) - len(clean)
    content: dict[str, Any] = {}
    ready: dict[str, list[dict[str, Any]]] = {}
    for name, conversations in (("train", clean), ("test", test)):
        if tokenizer is None:
            ready[name] = [formats.to_row(conversation) for conversation in conversations]
            content[name] = {"conversations": len(conversations)}
            continue
        pairs = prepared.tokenize(conversations, tokenizer, settings.max_length, report)
        require_supervised([example for example, _ in pairs], settings.dataset)
        ready[name] = [prepared.example_row(example, conversation) for example, conversation in pairs]
        tokens = sum(len(example.token_ids) for example, _ in pairs)
        supervised = sum(int(example.loss_mask.sum()) for example, _ in pairs)
        content[name] = {"conversations": len(pairs), "tokens": tokens, "supervised_tokens": supervised}
    for name, rows in ready.items():  # nothing is written before both splits are known to be good
        with replacing(settings.output / f"{name}.jsonl") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    content |= {
        "rows": report.rows,
        "dropped": report.dropped,
        "broken_lines": report.broken_lines,
        "tokenizer_hash": tokenizer.fingerprint if tokenizer else None,
        "template_hash": tokenizer.template_fingerprint if tokenizer else None,
        "settings": settings.model_dump(mode="json"),
    }
    write_json(settings.output / "report.json", content)
    for name in ("train", "test"):
        say(f"{name:>5}: " + ", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in content[name].items()))
    dropped = ", ".join(f"{count} {reason}" for reason, count in report.dropped.items() if count)
    say(f"of {report.rows:,} rows; dropped: {dropped or 'none'}")
    say(f"next: specforge prepare-hidden --model-path {settings.model_path or 'TARGET'} --data {settings.output}")
    return None


def regenerate(settings: RegenerateSettings) -> int | None:
    report = formats.ReadReport()
    asked = formats.read_conversations(settings.prompts, report, needed="user")
    tokenizer = ChatTokenizer(settings.model_path, trust_remote_code=settings.trust_remote_code)
    info = weights.describe(settings.model_path, settings.trust_remote_code)
    engine = _start_engine(settings, info, launch.join(settings.tp_size), settings.output.parent)
    kept = 0
    with replacing(settings.output) as file, progress("answering", len(asked), "prompts") as bar:
        for batch in regeneration.answer(engine, tokenizer, asked, settings.max_new_tokens, settings.batch_size):
            for conversation in batch:
                if conversation is not None:
                    file.write(json.dumps(formats.to_row(conversation), ensure_ascii=False) + "\n")
                    kept += 1
            advance(bar, len(batch))
    say(f"{kept} of {len(asked)} answers ended within {settings.max_new_tokens} tokens and were kept")
    say(f"next: specforge prepare-data --dataset {settings.output} --model-path {settings.model_path}")
    return None


def prepare_hidden(settings: PrepareHiddenSettings) -> int | None:
    info = weights.describe(settings.model_path, settings.trust_remote_code)
    engines.check_tp(info, settings.tp_size)
    layers = engines.aux_layers_of(settings, info)
    tokenizer = ChatTokenizer(settings.model_path, settings.chat_template, settings.trust_remote_code)
    splits = prepared.load_splits(settings.data, tokenizer, settings.max_length, settings.num_samples)
    _check_lengths(splits, settings.tokens_per_batch)
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
        shard_bytes = settings.shard_mb << 20
        writers = {name: StoreWriter(settings.output / name, m, 0, shard_bytes) for name, m in manifests.items()}
        missing = [e for n, examples in splits.items() for e in examples if e.sample_id not in writers[n].committed]
        bytes_each = info.hidden_size * (8 if dtype != torch.float32 else 16)
        check_space(settings.output, sum(len(example.token_ids) for example in missing) * bytes_each)
        code = launch.start_ranks(settings.tp_size)
        if code is not None:
            return code
    ranks = launch.join(settings.tp_size)
    engine = _start_engine(settings, info, ranks, settings.output)
    for name, examples in splits.items():
        _capture_split(engine, examples, manifests[name], settings, name, ranks)
    if is_main_rank():
        size = sum(Store(settings.output / name).bytes() for name in splits)
        say(f"features: {size / 1e6:,.0f} MB in {settings.output}")
        say(f"next: specforge train --features {settings.output} --model-path {settings.model_path}")
    _leave(ranks)
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


def train(settings: TrainSettings) -> int | None:
    if settings.online == (settings.features is not None):
        raise ConfigError(
            "training takes either a feature store or the live target",
            where="--features, --online",
            fix="give --features FOLDER (made by `specforge prepare-hidden`) or --online, not both",
        )
    _refuse_foreign(settings.output, "run.json")
    stores = {n: Store(settings.features / n) for n in ("train", "test")} if settings.features else None
    model_path = settings.model_path or (stores["train"].manifest.target if stores else None)
    if model_path is None:
        raise ConfigError("the target is not named", where="--model-path", fix="give the target's folder or hub name")
    info = weights.describe(model_path, settings.trust_remote_code)
    engines.check_tp(info, settings.tp_size)
    tokenizer = ChatTokenizer(model_path, settings.chat_template, settings.trust_remote_code)
    splits: dict[str, list[Example]] = {}
    if stores:
        layers = _layers_of_store(stores["train"], settings, info, tokenizer)
        data_hash = stores["train"].manifest.data_hash
        counted = stores["train"].tokens_and_masks()
    else:
        layers = engines.aux_layers_of(settings, info)
        splits = prepared.load_splits(settings.data, tokenizer, settings.max_length, test=settings.test_data)
        _check_lengths(splits, settings.tokens_per_batch)
        data_hash = prepared.data_hash(splits["train"])
        counted = ((example.token_ids, example.loss_mask) for example in splits["train"])
        code = launch.start_ranks(settings.tp_size)
        if code is not None:
            return code
    counts_V = vocab.count_supervised(counted, info.vocab_size)
    ranks = launch.join(settings.tp_size)
    ds_config = deepspeed_config(settings, ranks)
    dtype = torch.bfloat16 if ds_config.get("bf16", {}).get("enabled") else torch.float32
    identity = _identity(settings, info, layers, data_hash, str(dtype), ranks)
    state, kept, tensors = _resume_point(settings, identity)
    if state is None:
        kept = vocab.choose(counts_V, settings.draft_vocab_size, tokenizer.special_ids())
    if is_main_rank():
        write_json(settings.output / "run.json", {"settings": settings.model_dump(mode="json"), "identity": identity})
    sources: dict[str, RecordSource]
    if stores:
        console.quiet(settings.output / _log_name())
        sources = {name: StoreSource(store, ranks.tp_rank) for name, store in stores.items()}
    else:
        engine = _start_engine(settings, info, ranks, settings.output)
        sources = {name: LiveSource(engine, examples, ranks.tp_rank) for name, examples in splits.items()}

    kept_D = torch.from_numpy(np.asarray(kept)).to(ranks.device)
    head = weights.load_head(info, dtype)
    config = DraftConfig.for_target(info, layers, len(kept_D), settings.draft_intermediate_size)
    draft = Eagle3Draft(config)
    draft.initialise(head, kept_D.cpu(), settings.seed)
    step = DraftStep(draft.to(ranks.device), head.to(ranks.device), kept_D, settings.steps, settings.step_decay)
    optimizer = DraftOptimizer(step, ds_config, ranks)
    if state is not None and tensors is not None:
        optimizer.load_state(tensors, state.updates)
        say(f"going on after step {state.updates}, epoch {state.epoch + 1}")
    say(
        f"draft: {sum(p.numel() for p in draft.parameters()) / 1e6:.1f} M parameters, vocabulary {len(kept_D):,} "
        f"({vocab.coverage(counts_V, np.asarray(kept)):.1%} of the supervised tokens); {ranks.world} rank(s), {dtype}"
    )
    held_out_rows = pack_rows(sources["test"].lengths, settings.row_tokens, seed=0, epoch=0)

    def evaluate() -> Acceptance:
        batches = held_out_batches(sources["test"], held_out_rows, ranks, dtype)
        return teacher_forced(draft.eval(), head.embedding_VH.to(ranks.device), kept_D, batches, settings.steps)

    def plan(epoch: int) -> Slots:
        rows = pack_rows(sources["train"].lengths, settings.row_tokens, settings.seed, epoch)
        return share_out(rows, settings.rows_per_step, ranks.world)

    run = Run(
        settings=settings,
        ranks=ranks,
        step=step,
        optimizer=optimizer,
        source=sources["train"],
        plan=plan,
        evaluate=evaluate,
        identity=identity,
        dtype=dtype,
        state=state or checkpoint.RunState(),
    )
    run_training(run)
    if is_main_rank():
        _say_serving(settings.output / "best", model_path, settings.steps)
    _leave(ranks)
    return None


def benchmark(settings: BenchmarkSettings) -> int | None:
    draft_config = draft_folder.load(settings.draft, torch.float32)[0].config
    info = weights.describe(settings.model_path, settings.trust_remote_code)
    if draft_config.target_fingerprint not in ("", info.fingerprint):
        raise CheckpointError(
            "the draft was trained for another target",
            where=f"{settings.draft}/config.json, 'specforge.target_fingerprint'",
            fix="give the draft's own target with --model-path",
        )
    if settings.features is None and settings.data is None:
        raise ConfigError(
            "there is no held-out text", where="--features, --data", fix="give one of them: a store, or prepared data"
        )
    ranks = launch.join(1)
    engine: TargetEngine | None = None
    layers = {"aux_layers": draft_config.aux_layers}
    if settings.features is None or settings.num_prompts:
        log_folder = settings.output.parent if settings.output else settings.draft
        engine = _start_engine(settings.model_copy(update=layers), info, ranks, log_folder)
    source: RecordSource
    if settings.features:
        store = Store(settings.features / "test")
        _check_target(store, info)
        source = StoreSource(store, 0)
        prompts = [_prompt(r.token_ids.numpy(), r.loss_mask.numpy()) for r in map(store.record, range(len(store)))]
    else:
        assert settings.data is not None
        assert engine is not None
        tokenizer = ChatTokenizer(settings.model_path, settings.chat_template, settings.trust_remote_code)
        examples = prepared.load_splits(settings.data, tokenizer, settings.max_length)["test"]
        source = LiveSource(engine, examples, 0)
        prompts = [_prompt(example.token_ids, example.loss_mask) for example in examples]

    dtype = torch.float32 if info.dtype == torch.float32 or settings.dtype == "float32" else torch.bfloat16
    draft, kept_D = draft_folder.load(settings.draft, dtype)
    draft, kept_D = draft.to(ranks.device).eval(), kept_D.to(ranks.device)
    embedding_VH = weights.load_head(info, dtype).embedding_VH.to(ranks.device)
    rows = pack_rows(source.lengths, settings.max_length, seed=0, epoch=0)
    batches = held_out_batches(source, rows, ranks, dtype)
    forced = teacher_forced(draft, embedding_VH, kept_D, batches, settings.steps)
    result: dict[str, Any] = {
        "draft": str(settings.draft),
        "target": settings.model_path,
        "steps": settings.steps,
        "teacher_forced": {
            "acceptance_length": forced.length,
            "walk_length": forced.walk_length,
            "acceptance_by_position": forced.share,
            "coverage": forced.coverage,
            "predictions": forced.rows[0],
        },
    }
    say(
        f"teacher-forced acceptance length {forced.length:.3f} (walk {forced.walk_length:.3f}) over "
        f"{forced.rows[0]:,} held-out predictions, {settings.steps} steps"
    )
    lossless = True
    if settings.num_prompts and engine is not None:
        stop_ids = ChatTokenizer(settings.model_path, settings.chat_template, settings.trust_remote_code).stop_ids()
        chosen = [prompt for prompt in prompts if prompt][: settings.num_prompts]
        pairs = []
        for prompt in console.tracked(chosen, "decoding", len(chosen), "prompts"):
            greedy = decode.plain(engine, prompt, settings.max_new_tokens, stop_ids)
            fast = decode.speculative(
                engine, draft, embedding_VH, kept_D, prompt, settings.max_new_tokens, stop_ids, settings.steps
            )
            pairs.append((greedy, fast))
        comparison = decode.compare(pairs, engine.dtype)
        lossless = comparison.lossless
        passes = sum(fast.passes for _, fast in pairs)
        made = sum(len(fast.tokens) - 1 for _, fast in pairs)  # the first token comes with the prompt's pass
        result["decode"] = {
            "engine": engine.name,
            "dtype": str(engine.dtype).removeprefix("torch."),
            "acceptance_length": made / max(passes, 1),
            "greedy_lossless": lossless,
            **asdict(comparison),
            "tokens_per_second": made / sum(fast.seconds for _, fast in pairs),
            "plain_tokens_per_second": sum(len(g.tokens) - 1 for g, _ in pairs) / sum(g.seconds for g, _ in pairs),
        }
        say(
            f"real decoding: acceptance length {made / max(passes, 1):.3f} over {passes:,} passes; text equals plain "
            f"greedy on {comparison.equal} of {len(pairs)} prompts, {comparison.apart_at_near_tie} part at a near-tie"
        )
    if settings.output:
        write_json(settings.output, result)
    if not lossless:
        say("[bold red]the decoded text differs from plain greedy decoding[/]: please report this")
        return 1
    _say_serving(settings.draft, settings.model_path, settings.steps)
    return None


def _start_engine(settings: Any, info: TargetInfo, ranks: Ranks, log_folder: Path) -> TargetEngine:
    console.quiet(log_folder / _log_name())
    engine = engines.load(settings, info, ranks)
    say(f"target {info.path} in {engine.name}, {engine.dtype}, {ranks.world} rank(s), tensor parallel {ranks.tp_size}")
    return engine


def _log_name() -> str:
    return "specforge.log" if is_main_rank() else f"specforge-rank{dist.get_rank()}.log"


def _leave(ranks: Ranks) -> None:
    dist.barrier()
    dist.destroy_process_group()


def _refuse_foreign(folder: Path, own_file: str) -> None:
    """An output folder may be new, empty, or ours; anything else in it is not touched."""
    ours = {"specforge.log", own_file}
    if folder.is_dir() and not (folder / own_file).exists() and any(p.name not in ours for p in folder.iterdir()):
        raise ConfigError(
            "the output folder holds something else", where=f"--output {folder}", fix="choose a new or empty folder"
        )


def _check_lengths(splits: dict[str, list[Example]], tokens_per_batch: int) -> None:
    longest = max(len(example.token_ids) for examples in splits.values() for example in examples)
    if longest > tokens_per_batch:
        raise ConfigError(
            f"the longest conversation has {longest} tokens, more than one pass of the target takes",
            where=f"--tokens-per-batch {tokens_per_batch}",
            fix=f"raise it to at least {longest}, or lower --max-length",
        )


def _check_target(store: Store, info: TargetInfo) -> None:
    if store.manifest.target_fingerprint != info.fingerprint:
        raise StoreError(
            f"the store was captured from another target ({store.manifest.target}), not from {info.path}",
            where=f"{store.folder}/manifest.json, 'target_fingerprint'",
            fix="give that target with --model-path, or capture again with `specforge prepare-hidden`",
        )


def _layers_of_store(
    store: Store, settings: TrainSettings, info: TargetInfo, tokenizer: ChatTokenizer
) -> tuple[int, ...]:
    """The store's aux layers; raises where target, tokenizer or layers are not those of the run."""
    _check_target(store, info)
    manifest = store.manifest
    if manifest.tokenizer_hash != tokenizer.fingerprint:
        raise StoreError(
            "the store was made with another tokenizer",
            where=f"{store.folder}/manifest.json, 'tokenizer_hash'",
            fix="capture again with `specforge prepare-hidden`",
        )
    if settings.aux_layers and tuple(settings.aux_layers) != manifest.aux_layers:
        shown = " ".join(map(str, settings.aux_layers))
        raise ConfigError(
            f"the store was captured from layers {list(manifest.aux_layers)}, --aux-layers says {shown}",
            where=f"{store.folder}/manifest.json, 'aux_layers'",
            fix=f"capture again with --aux-layers {shown}, or drop the flag to take the store's",
        )
    return manifest.aux_layers


def _identity(
    settings: TrainSettings, info: TargetInfo, layers: tuple[int, ...], data_hash: str, dtype: str, ranks: Ranks
) -> dict[str, Any]:
    """What a resumed run must share with the one that it goes on with."""
    shared = ("steps", "step_decay", "epochs", "row_tokens", "rows_per_step", "lr", "warmup_share", "max_grad_norm")
    return {
        "target_fingerprint": info.fingerprint,
        "data_hash": data_hash,
        "aux_layers": list(layers),
        "dtype": dtype,
        "seed": settings.seed,
        "draft_vocab_size": settings.draft_vocab_size,
        "draft_intermediate_size": settings.draft_intermediate_size,
        **{name: getattr(settings, name) for name in shared},
    }


def _resume_point(
    settings: TrainSettings, identity: dict[str, Any]
) -> tuple[checkpoint.RunState | None, Any, dict[str, torch.Tensor] | None]:
    """(state, draft vocabulary, tensors) of the newest checkpoint, or Nones."""
    found = checkpoint.checkpoints(settings.output / "checkpoints")
    if not found or not settings.resume:
        return None, None, None
    state, tensors = checkpoint.load(found[-1], identity)
    _, kept_D = draft_folder.load(found[-1], torch.float32)
    return state, kept_D.numpy(), tensors


def _prompt(token_ids: Any, loss_mask: Any) -> list[int]:
    """Tokens before the first supervised one."""
    return [int(token) for token in token_ids[: int(np.argmax(loss_mask))]]


def _say_serving(draft: Path, model_path: str, steps: int) -> None:
    say(f"draft: {draft}")
    say(
        f"serve it: python -m sglang.launch_server --model-path {model_path} --speculative-algorithm EAGLE3 "
        f"--speculative-draft-model-path {draft} --speculative-num-steps {min(steps, 3)} "
        f"--speculative-eagle-topk 1 --speculative-num-draft-tokens {min(steps, 3) + 1}"
    )


def demo(settings: DemoSettings) -> int | None:
    demonstration.run(settings)
    return None


def doctor(settings: DoctorSettings) -> int | None:
    return doctoring.report()
