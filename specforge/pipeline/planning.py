"""What capture and training will cost, before any GPU hour: from the data, the target's config and the headers of its
weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from specforge.alignment import teacher_rows
from specforge.config import PlanSettings
from specforge.console import console, say
from specforge.data import prepared
from specforge.data.tokenize import ChatTokenizer
from specforge.draft.memory import kept_bytes, loss_bytes
from specforge.draft.model import DraftConfig, Eagle3Draft
from specforge.errors import ConfigError
from specforge.features.codec import CODECS, codec_for
from specforge.features.shard import record_bytes
from specforge.files import read_json, write_json
from specforge.pipeline.shared import check_lengths
from specforge.records import HEAD_LOGITS, MAX_EXAMPLES, Example, TargetInfo
from specforge.target import engine as engines
from specforge.target import weights
from specforge.train import recipe
from specforge.train.muon import is_muon, update_bytes

BYTE_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1, "B"))
BUCKET = 500_000_000  # gradients: DeepSpeed's reduce_bucket_size if ds_config.json names none
TOTAL = "memory of"  # begins the last line of a kind of rank
RATE_FILE = "capture.json"


@dataclass(frozen=True, slots=True)
class Figure:
    """A line of the plan: a number of a unit, and where it comes from."""

    what: str
    value: float
    unit: str
    why: str


def plan(settings: PlanSettings) -> int | None:
    compared = settings.rate_from is not None
    info = weights.describe(settings.model_path, settings.trust_remote_code, fingerprinted=compared)
    engines.check_tp(info, settings.tp_size, settings.engine)
    tokenizer = ChatTokenizer(settings.model_path, settings.chat_template, settings.trust_remote_code)
    splits = prepared.load_splits(settings.data, tokenizer, settings, settings.num_samples)
    check_lengths(splits, settings.tokens_per_batch)
    examples = [example for found in splits.values() for example in found]
    dtype = info.dtype if settings.dtype == "auto" else engines.DTYPES[settings.dtype]
    wanted = codec_for(settings.codec, dtype)
    lines = [
        *data_figures(examples, splits),
        *disk_figures(examples, info, wanted),
        *memory_figures(settings, info, dtype, max(len(example.token_ids) for example in examples)),
        *hour_figures(settings, info, sum(len(example.token_ids) for example in examples)),
    ]
    table = Table("what", "figure", "why", title=f"{settings.model_path}, {settings.data}", title_justify="left")
    for line in lines:
        table.add_row(line.what, _shown(line), line.why, end_section=line.what.startswith(TOTAL))
    console.print(table)
    following = "train --online" if settings.online else "prepare-hidden"
    say(f"next: specforge {following} --model-path {settings.model_path} --data {settings.data}")
    return None


def data_figures(examples: list[Example], splits: dict[str, list[Example]]) -> list[Figure]:
    tokens = sum(len(example.token_ids) for example in examples)
    supervised = sum(int(example.loss_mask.sum()) for example in examples)
    teachers = sum(len(teacher_rows(example.loss_mask)) for example in examples)
    return [
        Figure("samples", len(examples), "", ", ".join(f"{len(found):,} {name}" for name, found in splits.items())),
        Figure("tokens", tokens, "", f"longest sample: {max(len(e.token_ids) for e in examples):,}; no padding"),
        Figure("supervised share", 100 * supervised / tokens, "%", f"{supervised:,} tokens that the assistant says"),
        Figure("teacher rows", teachers, "", "tokens whose last hidden state is kept (specforge/alignment.py)"),
    ]


def disk_figures(examples: list[Example], info: TargetInfo, wanted: str) -> list[Figure]:
    """Bytes on disk for each codec: 3H values a token, H a teacher row, 5 bytes a token for ids and mask, 8 a teacher
    row for argmax and logsumexp, 200 a record at most for indexes (docs/formats.md)."""
    tokens = sum(len(example.token_ids) for example in examples)
    lines = []
    for codec in CODECS:
        if "zstd" in codec:
            continue  # its gain depends on the states
        size = sum(
            record_bytes(codec, info.hidden_size, len(example.token_ids), len(teacher_rows(example.loss_mask)))
            for example in examples
        )
        why = f"{size / tokens:,.0f} bytes a token at hidden size {info.hidden_size:,}"
        lines.append(
            Figure(f"disk, {codec}", size, "B", why + (", what this capture writes" if codec == wanted else ""))
        )
    return lines


def memory_figures(settings: PlanSettings, info: TargetInfo, dtype: torch.dtype, longest: int) -> list[Figure]:
    """GPU memory of one rank: of capture and of training from the store, or of training with the live target.
    `longest`: tokens of the longest sample."""
    target, draft = target_figures(settings, info, dtype), draft_figures(settings, info, longest)
    if settings.online:
        return [*target, *draft, _total("an online training rank", [*target, *draft])]
    return [*target, _total("a capture rank", target), *draft, _total("an offline training rank", draft)]


def _total(kind: str, lines: list[Figure]) -> Figure:
    return Figure(f"{TOTAL} {kind}", sum(line.value for line in lines), "B", "sum of the above")


def target_figures(settings: PlanSettings, info: TargetInfo, dtype: torch.dtype) -> list[Figure]:
    """The target's share. Activations are an estimate, the rest is exact but for what the allocator rounds up."""
    config: dict[str, Any] = info.config
    tp, width, hidden = settings.tp_size, dtype.itemsize, info.hidden_size
    tokens = settings.tokens_per_batch
    intermediate = int(config.get("intermediate_size") or 4 * hidden)
    return [
        Figure("memory, weights", weights.loaded_bytes(info, dtype) / tp, "B", f"all tensors / tensor parallel {tp}"),
        Figure(
            "memory, KV cache",
            (tokens + MAX_EXAMPLES) * cache_bytes_a_token(info, tp, width),
            "B",
            f"--tokens-per-batch {tokens:,} + {MAX_EXAMPLES}, one pass; less where --mem-frac leaves less",
        ),
        Figure(
            "memory, captured states",
            tokens * (2 * 3 + 1) * hidden * width,
            "B",
            "3 aux layers, as the engine hands them over and side by side, and the last hidden",
        ),
        Figure(
            "memory, logits",
            min(HEAD_LOGITS, tokens * info.vocab_size) * (width + 2 * 4),
            "B",
            f"{HEAD_LOGITS:,} at a time at most, over the whole vocabulary, and in fp32",
        ),
        Figure(
            "memory, activations",
            tokens * (4 * hidden + 3 * intermediate / tp) * width,
            "B",
            "estimate: residual, norm, attention and gated MLP of one layer",
        ),
    ]


def cache_bytes_a_token(info: TargetInfo, tp_size: int, width: int) -> float:
    """Keys and values of all layers. Where ranks outnumber key/value heads, each holds one head. Multi-head latent
    attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) keeps one latent and one rotary key, on every rank."""
    config: dict[str, Any] = info.config
    if config.get("kv_lora_rank"):
        return info.num_layers * (int(config["kv_lora_rank"]) + int(config["qk_rope_head_dim"])) * width
    heads = int(config["num_attention_heads"])
    kv_heads = max(1, int(config.get("num_key_value_heads") or heads) // tp_size)
    head_dim = int(config.get("head_dim") or info.hidden_size // heads)
    return info.num_layers * 2 * kv_heads * head_dim * width


def draft_figures(settings: PlanSettings, info: TargetInfo, longest: int) -> list[Figure]:
    """The draft's share: bf16 under ZeRO-2, which has parameters on every rank and shares the rest (Rajbhandari et al.,
    arXiv 1910.02054, section 5). Rows are as long as they may be, and every token of theirs counts at every step."""
    layers = engines.aux_layers_of(settings, info)
    config = DraftConfig.for_target(
        info, layers, settings.draft_vocab_size, settings.draft_intermediate_size, **settings.norms()
    )
    with torch.device("meta"):
        named = dict(Eagle3Draft(config).named_parameters())
    parameters = sum(parameter.numel() for parameter in named.values())
    matrices = [parameter.shape for name, parameter in named.items() if is_muon(name, parameter.shape)]
    world = settings.tp_size * (settings.dp_size or 1)
    row = max(settings.row_tokens, longest)
    kept, loss = (of(config, row, settings.steps, 2) for of in (kept_bytes, loss_bytes))
    lines = [
        Figure("memory, draft", 2 * parameters, "B", f"{parameters / 1e6:,.1f} M parameters in bf16"),
        Figure("memory, gradients", 2 * parameters / world, "B", f"bf16, ZeRO-2 shares them over {world} ranks"),
        Figure(
            "memory, optimizer",
            (12 * parameters - 4 * sum(shape.numel() for shape in matrices)) / world,
            "B",
            f"fp32 copy, one moment of Muon's matrices and two of the rest, over {world} ranks",
        ),
        Figure(
            "memory, embedding and head rows",
            2 * info.hidden_size * (info.vocab_size + config.draft_vocab_size),
            "B",
            "the target's, frozen, in bf16",
        ),
        Figure(
            "memory, packed rows",
            2 * max(row, recipe.MOST // world) * (len(layers) + 1) * info.hidden_size,
            "B",
            f"states of {recipe.MOST:,} tokens, an optimizer step's most, over {world} ranks; a row at least",
        ),
        Figure(
            "memory, unrolled draft",
            kept,
            "B",
            f"kept for the backward: {settings.steps} steps over {row:,} tokens, all of which count (draft/memory.py)",
        ),
        Figure("memory, loss", loss, "B", "on top of that, at its peak"),
        Figure("memory, gradient bucket", 2 * BUCKET, "B", f"DeepSpeed's, {BUCKET:,} values, during the backward"),
    ]
    update, free = update_bytes(parameters, matrices, world), kept + loss + 2 * BUCKET
    if update > free:
        why = f"{update / 1e9:,.1f} GB after the backward, less what the last three leave free"
        lines.append(Figure("memory, optimizer step", update - free, "B", why))
    return lines


def hour_figures(settings: PlanSettings, info: TargetInfo, tokens: int) -> list[Figure]:
    copies = settings.dp_size or 1
    rate, source = settings.tokens_per_second, "--tokens-per-second"
    if settings.rate_from is not None:
        rate, source = read_rate(settings.rate_from, info), f"measured in {settings.rate_from}"
    if rate is None:
        why = "not known: give --tokens-per-second, or --rate-from a folder that prepare-hidden wrote for this target"
        return [Figure("hours", math.nan, "", why)]
    why = f"{rate:,.0f} tokens/s ({source}) x {copies} " + ("copies" if copies > 1 else "copy") + " of the target"
    return [Figure("hours", tokens / rate / copies / 3600, "h", why + ("; each epoch" if settings.online else ""))]


def write_rate(output: Path, info: TargetInfo, rate: float, tp_size: int, device: torch.device) -> None:
    """tokens/s of one copy of the target, writing included, for a later plan."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    content = {"tokens_per_second": rate, "tp_size": tp_size, "device": name, "target_fingerprint": info.fingerprint}
    write_json(output / RATE_FILE, content)


def read_rate(folder: Path, info: TargetInfo) -> float:
    path = folder / RATE_FILE
    try:
        content = read_json(path)
        rate, fingerprint = float(content["tokens_per_second"]), content["target_fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            "there is no measured rate here",
            where=str(path),
            fix="give a folder of prepare-hidden, or --tokens-per-second",
        ) from error
    if fingerprint != info.fingerprint:
        raise ConfigError(
            "the rate was measured with another target", where=str(path), fix="give --tokens-per-second instead"
        )
    return rate


def _shown(line: Figure) -> str:
    if math.isnan(line.value):
        return "?"
    if line.unit == "B":
        scale, unit = next((scale, unit) for scale, unit in BYTE_UNITS if line.value >= scale or scale == 1)
        return f"{line.value / scale:,.1f} {unit}"
    return f"{line.value:,.1f} {line.unit}" if line.unit else f"{line.value:,.0f}"
