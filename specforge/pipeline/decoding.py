"""The benchmark's real decoding: plain and with the draft, and the search for the fastest shape of tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table

from specforge import hardware
from specforge.config import BenchmarkSettings, flags
from specforge.console import console, is_main_rank, say, tracked
from specforge.errors import ConfigError
from specforge.evaluate import decode
from specforge.evaluate.decode import Decoded, Limits, Text
from specforge.evaluate.drafter import Drafting
from specforge.evaluate.replay import SHAPES, Expected, sweep
from specforge.evaluate.rules import Drawn
from specforge.evaluate.shape import Shape
from specforge.records import MAX_EXAMPLES, TargetEngine


def shape_of(settings: BenchmarkSettings, draft_vocab_size: int) -> Shape:
    """Refuses what no tree can be; before anything is loaded."""
    if settings.top_k > draft_vocab_size:
        raise ConfigError(
            f"a node has {settings.top_k} children, the draft's vocabulary {draft_vocab_size} tokens",
            where=f"--top-k {settings.top_k}",
            fix="lower it; 2 to 8 is usual",
        )
    shape = Shape.default(settings.steps, settings.top_k)
    if settings.draft_tokens:
        shape = replace(shape, draft_tokens=settings.draft_tokens)
    if shape.draft_tokens > shape.capacity:
        raise ConfigError(
            f"{shape.draft_tokens} tokens cannot be verified: --steps {shape.steps} and --top-k {shape.top_k} give "
            f"{shape.capacity}, the newest token included",
            where=f"--draft-tokens {shape.draft_tokens}",
            fix=f"lower it to {shape.capacity}, or raise --steps or --top-k",
        )
    if settings.sweep and (settings.temperature or not settings.num_prompts):
        raise ConfigError(
            "the search replays greedy texts: they must be decoded, and at temperature 0",
            where="--sweep",
            fix="leave out --temperature and --num-prompts 0",
        )
    if settings.sweep and (chosen := settings.model_fields_set & {"top_k", "draft_tokens"}):
        raise ConfigError("the search chooses these itself", where=flags(chosen), fix="leave them out, or --sweep")
    for one in SHAPES if settings.sweep else (shape,):
        if one.most_paths > MAX_EXAMPLES:
            raise ConfigError(
                f"a tree of {one.draft_tokens} tokens may have {one.most_paths} paths, a pass takes {MAX_EXAMPLES}",
                where="--top-k, --draft-tokens",
                fix=f"verify {MAX_EXAMPLES + 1} tokens at most",
            )
        if settings.batch_size * one.most_paths > MAX_EXAMPLES:
            raise ConfigError(
                f"{settings.batch_size} prompts with trees of up to {one.most_paths} paths ({one}) are more than the "
                f"{MAX_EXAMPLES} sequences of a pass",
                where=f"--batch-size {settings.batch_size}",
                fix=f"lower it to {MAX_EXAMPLES // one.most_paths}" + ("" if settings.sweep else ", or --draft-tokens"),
            )
    return shape


def decoding(
    settings: BenchmarkSettings,
    engine: TargetEngine,
    drafting: Drafting,
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    domains: Sequence[str],
) -> dict[str, Any]:
    """Plain and speculative decoding of the same prompts, and what came of it: `decode` of the result, and with --sweep
    `sweep` and `best`. `domains`: of the prompts, or none."""
    limits = Limits(max_new_tokens=settings.max_new_tokens, stop_ids=stop_ids, batch_size=settings.batch_size)
    shapes = shapes_of(settings, drafting.shape, len(drafting.kept_D))
    rule = Drawn(settings.temperature, settings.seed) if settings.temperature else decode.GREEDY
    total = len(prompts)
    own = decode.plain(engine, tracked(prompts, "plain", total, "prompts"), limits, rule, record=settings.sweep)
    found: dict[str, Any] = {}
    best: Expected | None = None
    if settings.sweep and own.passes:
        rows = sweep(engine, drafting, own.texts, limits, tracked(shapes, "shapes", len(shapes), "shapes"))
        best = rows[_of_first_rank(max(range(len(rows)), key=lambda at: rows[at].speed_up), engine.device)]
        found["sweep"] = [_row(row) for row in rows]
        _show_sweep(rows, best)
        drafting = replace(drafting, shape=best.shape)
    fast = decode.speculative(engine, drafting, tracked(prompts, "decoding", total, "prompts"), limits, rule)
    found["decode"] = _compared(settings, engine, drafting.shape, own, fast) | _by_domain(fast.texts, domains)
    if best:
        measured = found["decode"]["speed_up"]
        found["best"] = _row(best) | {"measured_speed_up": measured, "measured_acceptance_length": fast.length}
        say(f"best: {best.shape}; speed-up expected {best.speed_up:.2f}, measured {measured:.2f}")
        if max(best.speed_up, measured) <= 1:
            say("[yellow]note[/] nothing is faster than plain decoding here, with this draft on this machine")
    return found


def _of_first_rank(choice: int, device: torch.device) -> int:
    """Ranks measure different times, and must choose the same."""
    chosen = torch.tensor(choice, device=device)
    dist.broadcast(chosen, src=0)
    return int(chosen)


def shapes_of(settings: BenchmarkSettings, shape: Shape, draft_vocab_size: int) -> list[Shape]:
    """What is tried: the one, or of the search's those that the draft's vocabulary has room for."""
    return [one for one in SHAPES if one.top_k <= draft_vocab_size] if settings.sweep else [shape]


def check_room(
    settings: BenchmarkSettings, engine: TargetEngine, prompts: Sequence[Sequence[int]], shapes: Sequence[Shape]
) -> None:
    """All prompts that are decoded at once have their places in the target's cache, whatever the draft says."""
    longest = max(map(len, prompts)) + settings.max_new_tokens
    context = engine.info.config.get("max_position_embeddings")
    deepest = max(shape.depth for shape in shapes)
    if isinstance(context, int) and longest + deepest > context:
        raise ConfigError(
            f"the longest prompt, {settings.max_new_tokens} new tokens and {deepest} drafts are more than the target's "
            f"context of {context}",
            where=f"--max-new-tokens {settings.max_new_tokens}",
            fix="lower it or --steps, or leave out the longest prompts",
        )
    needed = settings.batch_size * (longest + max(shape.most_tokens for shape in shapes))
    if needed > engine.tokens_per_batch:
        raise ConfigError(
            f"{settings.batch_size} prompts at once need up to {needed} tokens of the target's cache, which has room "
            f"for {engine.tokens_per_batch}",
            where=f"--tokens-per-batch {settings.tokens_per_batch}",
            fix="raise it, or lower --batch-size, --draft-tokens or --max-new-tokens",
        )


def _compared(
    settings: BenchmarkSettings, engine: TargetEngine, shape: Shape, own: Decoded, fast: Decoded
) -> dict[str, Any]:
    said = f"real decoding, {shape}: acceptance length {fast.length:.3f} over {fast.passes:,} passes"
    compared: dict[str, Any] = {}
    if settings.temperature:
        said += f" at temperature {settings.temperature:g}, seed {settings.seed}"
    else:
        comparison = decode.compare(zip(own.texts, fast.texts, strict=True), engine.dtype)
        compared = {"greedy_lossless": comparison.lossless, **asdict(comparison)}
        said += f"; text equals plain greedy on {comparison.equal} of {len(own.texts)} prompts, "
        said += f"{comparison.apart_at_near_tie} part at a near-tie"
    say(said)
    return {
        "engine": engine.name,
        "dtype": hardware.name(engine.dtype),
        "temperature": settings.temperature,
        "seed": settings.seed,
        "batch_size": settings.batch_size,
        **asdict(shape),
        "acceptance_length": fast.length,
        **compared,
        "tokens_per_second": fast.tokens_per_second,
        "plain_tokens_per_second": own.tokens_per_second,
        "speed_up": fast.tokens_per_second / own.tokens_per_second if own.passes else 1.0,
        "seconds": _seconds(fast),
        "plain_seconds": _seconds(own),
    }


def _by_domain(texts: Sequence[Text], domains: Sequence[str]) -> dict[str, Any]:
    """{"by_domain": {domain: accepted length, prompts}} where the prompts have domains."""
    found = dict[str, Any]()
    for name in dict.fromkeys(domain for domain in domains if domain):
        part = Decoded(texts=[text for text, domain in zip(texts, domains, strict=True) if domain == name])
        found[name] = {"acceptance_length": part.length, "prompts": len(part.texts)}
    return {"by_domain": found} if found else {}


def _seconds(found: Decoded) -> dict[str, float]:
    return {"prefill": found.prefill_seconds, "draft": found.draft_seconds, "target": found.target_seconds}


def _row(row: Expected) -> dict[str, Any]:
    return asdict(row.shape) | {
        "acceptance_length": row.length,
        "draft_ms": 1000 * row.draft_seconds,
        "target_ms": 1000 * row.target_seconds,
        "plain_ms": 1000 * row.plain_seconds,
        "tokens_per_second": row.tokens_per_second,
        "speed_up": row.speed_up,
    }


def _show_sweep(rows: Sequence[Expected], best: Expected) -> None:
    if not is_main_rank():
        return
    title = f"expected, by replay; a pass of plain decoding takes {1000 * best.plain_seconds:.1f} ms"
    table = Table("shape", title=title, title_justify="left")
    for name in ("length", "draft ms", "target ms", "tokens/s", "speed-up"):
        table.add_column(name, justify="right")
    for row in rows:
        times = (f"{1000 * seconds:.1f}" for seconds in (row.draft_seconds, row.target_seconds))
        figures = (f"{row.length:.3f}", *times, f"{row.tokens_per_second:.1f}", f"{row.speed_up:.2f}")
        mark = " *" if row is best else ""
        table.add_row(f"{row.shape}{mark}", *figures, style="bold" if row is best else None)
    console.print(table)
