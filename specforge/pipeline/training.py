"""Training, from a store or with the live target."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from specforge import console, hardware, launch
from specforge.config import (
    TrainSettings,
)
from specforge.console import is_main_rank, say
from specforge.data import prepared, vocab
from specforge.data.tokenize import ChatTokenizer
from specforge.draft import folder as draft_folder
from specforge.draft.model import NORMS, DraftConfig, Eagle3Draft
from specforge.draft.step import DraftStep
from specforge.errors import ConfigError, StoreError, TrainingError, first_line, is_out_of_memory
from specforge.evaluate.acceptance import teacher_forced
from specforge.evaluate.shape import Shape
from specforge.features.hybrid import HybridSource
from specforge.features.index import existing, refuse_busy
from specforge.features.packing import Row, pack_rows, share_out
from specforge.features.sources import LiveSource, StoreSource, held_out_batches
from specforge.features.store import Store
from specforge.files import HeldError, held, new_folder, sign, write_json
from specforge.pipeline.checking import after_training
from specforge.pipeline.shared import (
    SERVED_STEPS,
    check_lengths,
    check_target,
    leave,
    log_name,
    manifest_of,
    refuse_foreign,
    say_serving,
    say_set_aside,
    start_engine,
    watched,
)
from specforge.records import Acceptance, Ranks, RecordSource, TargetEngine, TargetInfo
from specforge.target import engine as engines
from specforge.target import weights
from specforge.train import checkpoint, tracker
from specforge.train.loop import Run, Slots
from specforge.train.loop import train as run_training
from specforge.train.optimizer import DraftOptimizer, deepspeed_config, training_dtype
from specforge.train.plain import PlainOptimizer
from specforge.train.recipe import Recipe, choose

SET_ASIDE = "set-aside"  # folder in the output: what could not be captured, where no store keeps it


def train(settings: TrainSettings) -> int | None:
    if not settings.online and settings.features is None:
        raise ConfigError(
            "training takes a feature store or the live target",
            where="--features, --online",
            fix="give --features FOLDER (made by `specforge prepare-hidden`), --online, or both: then each "
            "conversation is captured once and kept there",
        )
    if not (settings.online and settings.features) and (settings.max_disk or settings.codec != "auto"):
        raise ConfigError(
            "--max-disk and --codec say how captured states are kept, and this run keeps none",
            where="--max-disk, --codec",
            fix="give --online and --features FOLDER, or leave them out",
        )
    tracker.check(settings.tracker)
    refuse_foreign(settings.output, "run.json")
    if settings.output.exists() and not launch.is_rank():
        with _owned(settings.output):  # told before any rank starts
            pass
    stores = (
        {n: Store(settings.features / n, settings.verify) for n in ("train", "test")}
        if settings.features and not settings.online
        else None
    )
    model_path = settings.model_path or (stores["train"].manifest.target if stores else None)
    if model_path is None:
        raise ConfigError("the target is not named", where="--model-path", fix="give the target's folder or hub name")
    info = weights.describe(model_path, settings.trust_remote_code)
    engines.check_tp(info, settings.tp_size, settings.engine)
    tokenizer = ChatTokenizer(model_path, settings.chat_template, settings.trust_remote_code)
    if stores:
        return _train_from_store(settings, info, tokenizer, stores)
    return _train_online(settings, info, tokenizer)


def _train_from_store(
    settings: TrainSettings, info: TargetInfo, tokenizer: ChatTokenizer, stores: dict[str, Store]
) -> int | None:
    layers = _layers_of_store(stores["train"], settings, info, tokenizer)
    one, two = stores["train"].manifest, stores["test"].manifest
    different = one.differences(two, but=("data_hash", "num_records"))
    if different:
        raise StoreError(
            f"the stores of train and test were made with another {different[0]}",
            where=f"{stores['test'].folder}/manifest.json, '{different[0]}'",
            fix="capture both again with one `specforge prepare-hidden`",
        )
    code = launch.start_ranks(1, saves=True)
    if code is not None:
        return code
    counts_V = vocab.count_supervised(stores["train"].tokens_and_masks(), info.vocab_size)
    ranks = launch.join(1)
    console.quiet(settings.output / log_name())
    sources: dict[str, RecordSource] = {name: StoreSource(store, 0, ranks.device) for name, store in stores.items()}
    with _owned(settings.output):
        return _train(settings, info, layers, one.data_hash, one.dtype, counts_V, tokenizer, sources, ranks)


def _train_online(settings: TrainSettings, info: TargetInfo, tokenizer: ChatTokenizer) -> int | None:
    settings = _with_layers_of_draft(settings)
    layers = engines.aux_layers_of(settings, info)
    splits = prepared.load_splits(settings.data, tokenizer, settings, test=settings.test_data)
    check_lengths(splits, settings.tokens_per_batch)
    manifests = {name: manifest_of(settings, info, layers, tokenizer, found) for name, found in splits.items()}
    if settings.features and not launch.is_rank():
        for name in splits:
            existing(settings.features / name, manifests[name])
            refuse_busy(settings.features / name)
    code = launch.start_ranks(settings.tp_size, saves=True)
    if code is not None:
        return code
    counted = ((example.token_ids, example.loss_mask) for example in splits["train"])
    counts_V = vocab.count_supervised(counted, info.vocab_size)
    ranks = launch.join(settings.tp_size)
    _recipe(settings, sum(len(example.token_ids) for example in splits["train"]), info, ranks)  # refused before the
    # target is loaded
    engine = start_engine(settings, info, ranks, settings.output)
    sources: dict[str, RecordSource] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(_owned(settings.output))
        for name, examples in splits.items():
            folder = settings.features / name if settings.features else settings.output / SET_ASIDE / name
            sources[name] = live = LiveSource(engine, examples, ranks.tp_rank, folder)
            if settings.features:
                limit = settings.max_disk and settings.max_disk * len(examples) // sum(map(len, splits.values()))
                kept = HybridSource(live, examples, folder, manifests[name], ranks, limit)
                sources[name] = stack.enter_context(kept)
        data_hash, target_dtype = prepared.data_hash(splits["train"]), hardware.name(engine.dtype)
        code = _train(settings, info, layers, data_hash, target_dtype, counts_V, tokenizer, sources, ranks, engine)
        for name in splits:
            say_set_aside(name, (settings.features or settings.output / SET_ASIDE) / name)
        return code


def _train(
    settings: TrainSettings,
    info: TargetInfo,
    layers: tuple[int, ...],
    data_hash: str,
    target_dtype: str,
    counts_V: NDArray[np.int64],
    tokenizer: ChatTokenizer,
    sources: dict[str, RecordSource],
    ranks: Ranks,
    engine: TargetEngine | None = None,
) -> int | None:
    """The same from here on, wherever the records come from; `engine` is the live one."""
    recipe, ds_config = _recipe(settings, int(sources["train"].lengths.sum()), info, ranks)
    dtype = training_dtype(ds_config)
    dtypes = {"dtype": hardware.name(dtype), "target_dtype": target_dtype}
    identity = _identity(settings, recipe, info, layers, data_hash, dtypes)
    initial = _initial(settings, info, layers) if settings.init_from else None
    state, kept, tensors = _resume_point(settings, identity)
    if is_main_rank():
        given_up = () if settings.resume else ("checkpoints", "best")  # or a later resume would find them
        for name in given_up if state else (*given_up, SET_ASIDE):
            shutil.rmtree(settings.output / name, ignore_errors=True)
    if kept is None and initial:
        kept = initial[1].numpy()
    if kept is None:
        kept = vocab.choose(counts_V, settings.draft_vocab_size, tokenizer.special_ids())
    if is_main_rank():
        write_json(
            settings.output / "run.json",
            {"settings": settings.model_dump(mode="json"), "recipe": recipe.as_json(), "identity": identity},
        )
    kept_D = torch.from_numpy(kept).to(ranks.device)
    head = weights.load_head(info, dtype)
    if initial:
        draft = initial[0]
    else:
        sizes = (len(kept), settings.draft_intermediate_size)
        draft = Eagle3Draft(DraftConfig.for_target(info, layers, *sizes, **settings.norms()))
        draft.initialise(head, kept_D.cpu(), settings.seed)
    step = DraftStep(
        draft.to(ranks.device), head.to(ranks.device), kept_D, settings.steps, settings.step_decay, settings.loss
    )
    optimizer = (DraftOptimizer if settings.deepspeed else PlainOptimizer)(step, ds_config, ranks)
    if state is not None and tensors is not None:
        optimizer.load_state(tensors, state.applied)
        del tensors  # three times the draft in fp32
        say(f"going on after step {state.updates}, epoch {state.epoch + 1}")
    say(
        f"draft: {sum(p.numel() for p in draft.parameters()) / 1e6:.1f} M parameters, vocabulary {len(kept):,} "
        f"({vocab.coverage(counts_V, kept):.1%} of the supervised tokens); {ranks.world} rank(s), "
        f"{hardware.described(dtype, torch.bfloat16, ranks.device)}"
    )
    held_out_rows = pack_rows(sources["test"].lengths, recipe.row_tokens, seed=0, epoch=0)

    @lru_cache(maxsize=1)
    def plan(epoch: int) -> Slots:
        rows = pack_rows(sources["train"].lengths, recipe.row_tokens, settings.seed, epoch)
        return share_out(rows, recipe.batch_size, ranks.world)

    curves = None
    if is_main_rank() and settings.tracker != "none":
        curves = tracker.Tracker(settings.tracker, settings.output, settings.model_dump(mode="json"))
    with watched(ranks, settings.rank_timeout, engine) as watch:
        step.register_forward_hook(lambda *_: watch.beat())  # of each packed row

        def evaluate() -> Acceptance:
            batches = watch.over(held_out_batches(sources["test"], held_out_rows, ranks, dtype))
            return teacher_forced(draft.eval(), step.embedding_VH, kept_D, batches, settings.steps)

        run = Run(
            settings=settings,
            ranks=ranks,
            step=step,
            optimizer=optimizer,
            recipe=recipe,
            source=sources["train"],
            plan=plan,
            evaluate=evaluate,
            identity=identity,
            dtype=dtype,
            beat=watch.beat,
            tracker=curves,
            state=state or checkpoint.RunState(),
        )
        finished = _run(run)
        passed = not finished or _passes(settings, info, tokenizer, engine, sources["test"], held_out_rows, ranks)
    if curves:
        curves.close()
    leave(ranks)
    return None if passed else 2


@contextlib.contextmanager
def _owned(output: Path) -> Iterator[None]:
    """The lock of the one training that writes to this folder; rank 0 holds it."""
    if not is_main_rank():
        yield
        return
    with new_folder(output):
        path = output / ".lock"
        try:
            lock = held(path)
        except HeldError as error:
            raise ConfigError(
                f"{error} is training into the output folder",
                where=f"--output {output}",
                fix="wait for it or stop it; or choose another folder",
            ) from error
        with lock:
            sign(lock)
            try:
                yield
            finally:
                if not (output / "run.json").exists():  # refused before anything was written
                    path.unlink()


def _run(run: Run) -> bool:
    try:
        return run_training(run)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(
            f"the draft's step does not fit into memory: {first_line(error)}",
            where=f"behind step {run.state.updates}",
            fix="lower --row-tokens or --steps; with --online give the target less with --mem-frac, or raise --tp-size",
        ) from error


def _passes(
    settings: TrainSettings,
    info: TargetInfo,
    tokenizer: ChatTokenizer,
    engine: TargetEngine | None,
    held_out: RecordSource,
    rows: Sequence[Row],
    ranks: Ranks,
) -> bool:
    """Whether the best draft is what servers take it for. Says how to serve it."""
    few = list(rows[:1]) if engine else []
    records = [record for found in held_out.batches([few * ranks.tp_size]) for record in found] if few else []
    passed = after_training(settings.output / "best", info, tokenizer, engine, records, ranks)
    if passed:
        say_serving(settings.output / "best", info.path, Shape.chain(min(settings.steps, SERVED_STEPS)))
    return passed


def _initial(settings: TrainSettings, info: TargetInfo, layers: tuple[int, ...]) -> tuple[Eagle3Draft, torch.Tensor]:
    """(draft, draft vocabulary) to start from. Raises ConfigError where that draft does not fit the target."""
    assert settings.init_from
    draft, kept_D = draft_folder.load(settings.init_from, torch.float32)
    old = draft.config
    norms = {name: getattr(old, name) for name in NORMS}
    wanted = DraftConfig.for_target(info, layers, len(kept_D), old.intermediate_size, **norms)
    for field in fields(DraftConfig):
        one, two = getattr(old, field.name), getattr(wanted, field.name)
        if one != two and field.name not in ("target_fingerprint", "token_ids"):
            raise ConfigError(
                f"the draft to start from has another {field.name}: {one}, this run needs {two}",
                where=f"--init-from {settings.init_from}/config.json",
                fix="start from a draft of this target and these --aux-layers, or train anew",
            )
    draft.config = wanted
    return draft, kept_D


def _with_layers_of_draft(settings: TrainSettings) -> TrainSettings:
    """--aux-layers of the draft that is started from, where there is one and nothing else is said."""
    if settings.init_from is None or settings.aux_layers:
        return settings
    draft, _ = draft_folder.load(settings.init_from, torch.float32)
    return settings.model_copy(update={"aux_layers": draft.config.aux_layers})


def _layers_of_store(
    store: Store, settings: TrainSettings, info: TargetInfo, tokenizer: ChatTokenizer
) -> tuple[int, ...]:
    """The store's aux layers; raises where target, tokenizer or layers are not those of the run."""
    check_target(store, info)
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


def _recipe(settings: TrainSettings, tokens: int, info: TargetInfo, ranks: Ranks) -> tuple[Recipe, dict[str, Any]]:
    """The run's recipe and its DeepSpeed configuration. A resumed run keeps what `auto` chose for it."""
    before = checkpoint.newest_identity(settings.output / "checkpoints") if settings.resume else None
    recipe, reasons = choose(settings, tokens, info.hidden_size, ranks.world, before)
    auto = engines.DTYPES[before["dtype"]] if before else hardware.compute_dtype(torch.bfloat16, ranks.device)
    ds_config = deepspeed_config(settings, recipe, ranks, auto)
    for reason in reasons:
        say(reason)
    return recipe, ds_config


def _identity(
    settings: TrainSettings,
    recipe: Recipe,
    info: TargetInfo,
    layers: tuple[int, ...],
    data_hash: str,
    dtypes: dict[str, str],
) -> dict[str, Any]:
    """What a resumed run must share with the one that it goes on with."""
    shared = "loss steps step_decay ttt_growth epochs schedule max_grad_norm max_spike".split()
    return {
        "target_fingerprint": info.fingerprint,
        "data_hash": data_hash,
        "aux_layers": list(layers),
        **dtypes,
        "seed": settings.seed,
        "draft_vocab_size": settings.draft_vocab_size,
        "draft_intermediate_size": settings.draft_intermediate_size,
        **settings.norms(),
        "init_from": str(settings.init_from.resolve()) if settings.init_from else None,
        **{name: getattr(settings, name) for name in shared},
        **recipe.as_json(),
    }


def _resume_point(
    settings: TrainSettings, identity: dict[str, Any]
) -> tuple[checkpoint.RunState | None, NDArray[np.int64] | None, dict[str, torch.Tensor] | None]:
    """(state, draft vocabulary, tensors) of the newest checkpoint, or Nones."""
    found = checkpoint.load_newest(settings.output / "checkpoints", identity) if settings.resume else None
    if found is None:
        return None, None, None
    path, state, tensors = found
    _, kept_D = draft_folder.load(path, torch.float32)
    return state, kept_D.numpy(), tensors
