"""Every setting, once: name, type, default and help. The command line and YAML files fill these same classes."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, field_validator

from specforge.errors import ConfigError

POSITIONAL = ("folder", "folders", "runs")  # on the command line these are given without a flag

Rate = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]  # a learning rate
Auto = Literal["auto"]  # beside a number: chosen for the run (train/recipe.py)
Codec = Literal["auto", "bf16", "fp8", "bf16+zstd", "fp8+zstd"]


def flags(names: Iterable[str]) -> str:
    """Settings as they are typed."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in sorted(names))


SHORT = reprlib.Repr()  # of what a file says, in a message: an alias in YAML can stand for billions of values
SHORT.maxstring = SHORT.maxother = 200


class Settings(BaseModel):
    """Base of all settings: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class EngineSettings(Settings):
    """How the target runs."""

    model_path: str | None = Field(None, description="the target: a folder, or a hub name")
    engine: Literal["auto", "sglang", "hf"] = Field("auto", description="auto: SGLang wherever it imports")
    tp_size: int = Field(1, ge=1, description="ranks that share one copy of the target")
    mem_frac: float = Field(0.75, gt=0, lt=1, description="share of each GPU's memory for the target and its cache")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="auto: as stored; float32 on a CPU without instructions for that"
    )
    aux_layers: tuple[int, ...] | None = Field(
        None, description="three layer ids, id k = output of layer k (default: 1, N//2-1, N-4)"
    )
    tokens_per_batch: int = Field(8192, ge=1, description="most tokens in one forward pass of the target")
    trust_remote_code: bool = Field(False, description="run code that comes with the target")


class RankSettings(EngineSettings):
    """How the target runs, in ranks that work together."""

    rank_timeout: float = Field(
        600, gt=0, allow_inf_nan=False, description="seconds without progress after which a hung run is ended"
    )


class DataSettings(Settings):
    """How conversations become tokens and masks."""

    max_length: int = Field(2048, ge=8, description="most tokens of a conversation")
    overlong: Literal["truncate-turn", "truncate", "drop"] = Field(
        "truncate-turn", description="longer ones: cut behind the last whole turn that fits, cut anywhere, or drop"
    )
    train_on: Literal["all-turns", "last-turn"] = Field("all-turns", description="assistant turns to learn from")
    chat_template: str | None = Field(
        None, description="a Jinja file, or a short name such as llama3 (default: the target's own template)"
    )
    is_preformatted: bool = Field(False, description="rows hold {id, text} that already went through the template")


class VocabularySettings(Settings):
    """What the draft can say."""

    draft_vocab_size: int = Field(32000, ge=1, description="most frequent supervised tokens that the draft can say")


class ReadSettings(Settings):
    """How a feature store is read."""

    verify: Literal["always", "first", "never"] = Field(
        "first", description="compare a record's checksum: at each reading, at the first, or never"
    )


class PrepareDataSettings(DataSettings, VocabularySettings):
    """Conversations in, exact tokens and loss masks out, split into train and test."""

    dataset: tuple[str, ...] = Field(
        ..., min_length=1, description="ultrachat, sharegpt, mix, a file, or a hub name; =WEIGHT behind it; repeatable"
    )
    model_path: str | None = Field(
        None, description="the target, for its tokenizer and chat template; without it conversations stay text"
    )
    output: Path | None = Field(None, description="folder for train.jsonl and test.jsonl (default: cache/dataset/NAME)")
    test_share: float = Field(0.05, gt=0, lt=1, description="share of the prompts held out")
    min_exchanges: int | None = Field(
        None, ge=1, description="fewest assistant turns (default: 2 for ultrachat, sharegpt and mix, else 1)"
    )
    max_bad_rows: float = Field(0.01, ge=0, le=1, description="share of rows in no known format that is put up with")
    seed: int = Field(0, description="chooses the held-out prompts, and mixes several data sets")
    workers: int | None = Field(None, ge=1, description="processes that tokenize (default: one a core, 16 at most)")
    show_mask: int = Field(0, ge=0, description="show this many rows with the supervised tokens coloured, and stop")
    html: Path | None = Field(None, description="with --show-mask: write them as a page instead")

    @field_validator("dataset", mode="before")
    @classmethod
    def _one_is_a_list_of_one(cls, given: object) -> object:
        return (given,) if isinstance(given, str) else given

    trust_remote_code: bool = Field(False, description="run code that comes with the tokenizer")


class CaptureSettings(EngineSettings, DataSettings):
    """What is captured, and by how many ranks."""

    model_path: str = Field(..., description="the target: a folder, or a hub name")
    dp_size: int | None = Field(
        None, ge=1, description="copies of the target that share the work (default: as many as there are GPUs for)"
    )
    data: Path = Field(Path("cache/dataset/mix"), description="a prepared folder, or a JSONL file")
    num_samples: int | None = Field(None, ge=1, description="only the first samples of each split")
    codec: Codec = Field(
        "auto", description="how states are stored; auto: bf16, or fp32 for a target that runs in fp32"
    )


class PrepareHiddenSettings(CaptureSettings, RankSettings):
    """The target's hidden states for every token, into a store."""

    output: Path = Field(Path("cache/features"), description="folder for the stores (train/ and test/)")
    shard_mb: int = Field(1024, ge=1, description="size of a shard file in MiB")
    max_disk: ByteSize | None = Field(None, description="stop before the features take more, e.g. 500GB")


class DraftSettings(VocabularySettings):
    """The draft's size, and how much of it is unrolled at once."""

    draft_intermediate_size: int | None = Field(None, ge=1, description="width of the draft's MLP (default: target's)")
    fc_norm: bool = Field(False, description="EAGLE-3.1: a norm over each aux state before they are fused")
    norm_before_fc: bool = Field(False, description="EAGLE-3.1: or one norm over all of them at once")
    norm_output: bool = Field(False, description="EAGLE-3.1: the next step gets the normed state")
    steps: int = Field(7, ge=1, le=16, description="unrolled draft steps")

    def norms(self) -> dict[str, bool]:
        return {name: getattr(self, name) for name in ("fc_norm", "norm_before_fc", "norm_output")}


class PlanSettings(CaptureSettings, DraftSettings):
    """What capture and training will cost in disk, memory and hours; loads no weights and needs no GPU."""

    row_tokens: int = Field(2048, ge=8, description="most tokens in a packed row of the draft")

    online: bool = Field(
        False, description="plan for training with the live target, not for a capture and training from its store"
    )
    tokens_per_second: float | None = Field(None, gt=0, description="rate of one copy of the target, for the hours")
    rate_from: Path | None = Field(
        None, description="a folder that prepare-hidden wrote: takes the rate measured there"
    )


class TrainSettings(RankSettings, DataSettings, ReadSettings, DraftSettings):
    """Train a draft, from a store (--features) or with the live target (--online)."""

    features: Path | None = Field(
        None, description="folder that prepare-hidden wrote; with --online, where captured states are kept"
    )
    online: bool = Field(
        False, description="capture from the live target while training; with --features each conversation once"
    )
    codec: Codec = Field("auto", description="with --online --features: how states are stored")
    max_disk: ByteSize | None = Field(
        None, description="with --online --features: what has no room is captured in every epoch, e.g. 500GB"
    )
    data: Path = Field(Path("cache/dataset/mix"), description="with --online: a prepared folder or JSONL file")
    test_data: Path | None = Field(None, description="with --online: a JSONL file of held-out conversations")
    output: Path = Field(Path("runs/draft"), description="folder for checkpoints, metrics and the best draft")
    init_from: Path | None = Field(None, description="start from this draft, and keep its vocabulary and layers")
    deepspeed: bool = Field(True, description="train with DeepSpeed, else with plain torch: the same numbers")
    deepspeed_config: Path = Field(Path("ds_config.json"), description="DeepSpeed's own settings")
    loss: Literal["kl", "lk"] = Field(
        "kl", description="kl: cross-entropy against the target; lk: minus the log of the acceptance at temperature 1"
    )
    step_decay: float = Field(0.8, gt=0, le=1, description="weight of step i in the loss is this to the power of i")
    ttt_growth: float = Field(
        0.75,
        ge=0,
        le=1,
        description="share of the run in which the unrolled steps grow from 1 to --steps",
    )
    epochs: int = Field(10, ge=1)
    optimizer: Literal["muon", "adamw"] = Field(
        "muon", description="muon: Muon for the matrices, AdamW for head and norms; adamw: AdamW for everything"
    )
    row_tokens: Annotated[int, Field(ge=8)] | Auto = Field("auto", description="most tokens in a packed row")
    batch_size: Annotated[int, Field(ge=1)] | Auto = Field(
        "auto", description="packed rows in an optimizer step, over all ranks"
    )
    lr: Rate | Auto = Field("auto", description="peak learning rate (with muon: of the matrices)")
    adam_lr: Rate | Auto = Field("auto", description="with muon: peak learning rate of head and norms")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="the learning rate after its rise")
    warmup_share: Annotated[float, Field(ge=0, lt=1)] | Auto = Field(
        "auto", description="share of the steps with a rising learning rate"
    )
    max_grad_norm: float = Field(0.5, gt=0, allow_inf_nan=False)
    max_spike: float = Field(20, gt=1, description="skip a step whose gradient norm is so many times the median")
    patience: int | None = Field(
        None, ge=1, description="stop after so many epochs without a longer simulated decoding length"
    )
    tracker: Literal["tensorboard", "wandb", "none"] = Field(
        "tensorboard", description="where metrics go beside metrics.jsonl"
    )
    seed: int = 0
    save_steps: int = Field(1000, ge=1, description="optimizer steps between checkpoints (and at each epoch's end)")
    keep: int = Field(2, ge=1, description="checkpoints to keep besides the best draft")
    resume: bool = Field(True, description="go on from the newest checkpoint in the output folder")


class BenchmarkSettings(RankSettings, DataSettings, ReadSettings):
    """Acceptance length of a draft: teacher-forced on held-out text, by real decoding, and through a server."""

    model_path: str | None = Field(
        None,
        description="the target: a folder, or a hub name (with --server: the name of the served model, if several)",
    )
    draft: Path | None = Field(None, description="draft folder")
    features: Path | None = Field(None, description="store of held-out features (prepare-hidden's folder)")
    data: Path | None = Field(None, description="held-out conversations; with --features only their domains are taken")
    output: Path | None = Field(None, description="JSON file for the result")
    steps: int = Field(7, ge=1, le=16, description="draft steps for each pass of the target")
    top_k: int = Field(1, ge=1, description="of real decoding: children of each node and nodes of a step; 1: a chain")
    draft_tokens: int | None = Field(
        None,
        ge=2,
        description="tokens verified in a pass, the newest one too (default: steps + 1, of a tree 4 * top-k)",
    )
    batch_size: int = Field(1, ge=1, description="prompts decoded at once")
    sweep: bool = Field(False, description="look for the fastest steps, top-k and draft tokens, and decode with them")
    num_prompts: int = Field(20, ge=0, description="prompts for real decoding and for a server; 0: no decoding")
    questions: str | None = Field(
        None,
        description="those prompts: builtin, mt_bench, humaneval, gsm8k, math500, alpaca, cnn_dm or a file (default: "
        "the held-out text's own; through a server builtin)",
    )
    max_new_tokens: int = Field(64, ge=1)
    temperature: float = Field(0.0, ge=0, allow_inf_nan=False, description="of decoding; 0: the most likely token")
    seed: int = Field(0, ge=0, description="of the draws at a temperature above 0")
    server: str | None = Field(None, description="URL of a running SGLang or vLLM server to measure")
    launch: bool = Field(False, description="start an SGLang server for --model-path and --draft, measure it, end it")
    launch_args: str = Field("", description="with --launch: further arguments for SGLang, as one string")
    concurrency: tuple[int, ...] = Field(
        (1, 4, 16, 64), min_length=1, description="with a server: questions asked at once, one run for each number"
    )

    @field_validator("concurrency")
    @classmethod
    def _at_least_one(cls, given: tuple[int, ...]) -> tuple[int, ...]:
        if min(given) < 1:
            raise ValueError("a number of questions at once is at least 1")
        return given


class CheckSettings(RankSettings, DataSettings, ReadSettings):
    """Ask whether a draft folder is what servers take it for, and whether it fits its target."""

    folder: Path = Field(
        ..., description="draft folder, in the layout of SGLang, of vLLM's speculators or of SafeAILab"
    )
    model_path: str = Field(..., description="the target: a folder, or a hub name")
    features: Path | None = Field(None, description="folder that prepare-hidden wrote, for real features")
    data: Path | None = Field(None, description="or conversations to capture them from: a prepared folder or JSONL")
    positions: int = Field(1000, ge=1, description="real positions on which logits are compared, acceptance measured")
    steps: int = Field(3, ge=1, le=16, description="draft steps of the measured acceptance length")


class ExportSettings(Settings):
    """A draft folder in the layout that another server or repository reads; `--to sglang` reads theirs."""

    folder: Path = Field(..., description="draft folder, in any of the layouts (which one is seen by itself)")
    to: Literal["sglang", "vllm", "safeailab"] = Field(
        ..., description="sglang: our own, for SGLang and vLLM; vllm: the speculators format; safeailab: EAGLE's own"
    )
    output: Path = Field(..., description="a new folder")
    model_path: str | None = Field(
        None, description="the target (needed by vllm, and where the draft names no layer ids)"
    )
    trust_remote_code: bool = Field(False, description="run code that comes with the target")


class ReportSettings(Settings):
    """One HTML page of what runs have reached: acceptance, training, decoding, settings side by side."""

    runs: tuple[Path, ...] = Field(
        ..., min_length=1, description="folders of train or of demo, or benchmark's JSON files"
    )
    output: Path = Field(Path("report.html"), description="the page")


class RegenerateSettings(RankSettings):
    """Let the target answer every user turn itself, in this process or through a running server."""

    model_path: str | None = Field(
        None, description="the target: a folder, or a hub name (with --server: only to know its special tokens)"
    )
    prompts: Path = Field(..., description="JSONL of conversations; assistant turns in it are answered anew")
    output: Path = Field(..., description="JSONL of conversations with the target's own answers")
    server: str | None = Field(None, description="URL of a running OpenAI-compatible server to ask instead")
    concurrency: int = Field(64, ge=1, description="conversations answered at once")
    max_new_tokens: int = Field(256, ge=1, description="longer answers are not kept")
    temperature: float = Field(0.0, ge=0, allow_inf_nan=False, description="0: always the most likely token")
    top_p: float = Field(1.0, gt=0, le=1, description="draw from the most likely tokens of this probability")
    seed: int = Field(0, ge=0, description="of the draws at a temperature above 0")
    resume: bool = Field(True, description="go on with an unfinished run of the same output")


class StoreVerifySettings(Settings):
    """Compare all checksums of a feature store."""

    folder: Path = Field(..., description="a store, or the folder that prepare-hidden wrote")


class StoreInfoSettings(Settings):
    """What a feature store holds."""

    folder: Path = Field(..., description="a store, or the folder that prepare-hidden wrote")


class StoreMergeSettings(Settings):
    """Several feature stores of the same target into one. Shards are hard-linked where the disk allows it."""

    folders: tuple[Path, ...] = Field(..., min_length=2, description="stores, or folders that prepare-hidden wrote")
    output: Path = Field(..., description="a new folder")


class DemoSettings(Settings):
    """The whole way on a small real model, on a laptop."""

    output: Path = Field(Path("runs/demo"), description="folder for everything the demo makes")
    online: bool = Field(False, description="train with the live target; no features on disk")
    epochs: Annotated[int, Field(ge=1)] | Auto = Field("auto", description="auto: what this machine does in 15 minutes")
    draft_vocab_size: Annotated[int, Field(ge=1)] | Auto = Field("auto", description="auto: likewise")
    fresh: bool = Field(True, description="start anew (else go on where an earlier demo was)")


class DoctorSettings(Settings):
    """What is installed, what is missing, and the one command that mends each finding."""

    gpu: bool = Field(False, description="check the GPUs instead: states, attention, training step, memory, decoding")
    model_path: str | None = Field(
        None, description="with --gpu: a small target, as a folder or a hub name (default: a random one)"
    )


def load(settings: type[Settings], given: dict[str, Any], file: Path | None = None) -> Any:
    """The settings from a YAML file, overridden by what was given by hand. ConfigError names each bad key."""
    values: dict[str, Any] = {}
    if file is not None:
        import yaml

        try:
            values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise ConfigError(
                f"the settings file cannot be read: {error}",
                where=str(file),
                fix="give a YAML file of KEY: VALUE lines",
            ) from error
        if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
            raise ConfigError("the settings file is no mapping", where=str(file), fix="write KEY: VALUE lines")
    try:
        return settings(**(values | given))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"][:1])
        key = str(first["loc"][0]) if first["loc"] else name
        flag = key.upper() if key in POSITIONAL else f"--{key.replace('_', '-')}"
        where = f"{file}, key '{key}'" if key in values and key not in given else flag
        raise ConfigError(
            f"{name}: {first['msg'].lower()}"
            + (f", got {SHORT.repr(first['input'])}" if first["type"] != "missing" else ""),
            where=where,
            fix="see --help for names and ranges",
        ) from error
