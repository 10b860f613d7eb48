"""Runs to one page of HTML that needs nothing but itself."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from specforge import __version__
from specforge.records import HARDLY
from specforge.report.charts import (
    STYLES,
    Bars,
    Chart,
    Point,
    Segment,
    Series,
    chart,
    percent,
    plain,
    smoothed,
    thinned,
)
from specforge.report.runs import Decode, Measured, Run, Served

STILL_RISING = 0.01  # share that the last epoch brought
NONE = "–"
DRAWN = "the text was drawn, so not compared"


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a table: a cell a run. `differs` is marked."""

    label: str
    cells: list[str]
    differs: bool = False


def page(runs: Sequence[Run]) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    sections = [
        ("What is accepted", _acceptance(runs)),
        ("Is the draft's confidence right?", _calibration(runs)),
        ("Real decoding", _decoding(runs)),
        ("Training", _training(runs)),
    ]
    content = environment.get_template("page.html.jinja").render(
        runs=runs,
        verdict=verdict,
        sections=[(title, charts) for title, charts in sections if charts],
        positions=_positions(runs),
        overview=_overview(runs),
        settings=_settings(runs),
        styles=STYLES,
        version=__version__,
    )
    return content.encode("utf-8", "replace").decode("utf-8")  # file names and JSON may hold half characters


def verdict(run: Run) -> str:
    """What the figures of a run say, in words."""
    measured, best = run.measured, run.best_epoch
    first = measured.acceptance_by_position[0] if measured.acceptance_by_position else 0.0
    said = [f"The first draft token is accepted on {percent(first)} of the held-out rows."]
    if measured.acceptance_length < HARDLY:
        said = ["Hardly anything is accepted: see `specforge check` and docs/serving.md."]
    wanted = run.settings.get("epochs")
    if best is not None:
        last = max(run.evaluations)
        lengths = {epoch: found.acceptance_length for epoch, found in run.evaluations.items()}
        if isinstance(wanted, int) and last < wanted:
            said.append(f"{last} of {wanted} epochs are finished, the best so far is epoch {best}.")
        elif best < last:
            said.append(f"Best after epoch {best} of {last}; later epochs were worse.")
        elif lengths[best] - lengths.get(best - 1, 1.0) > STILL_RISING * lengths[best]:
            said.append(f"Epoch {best}, the last one, was the best and still rising: more epochs may help.")
        else:
            said.append(f"Epoch {best}, the last one, was the best; it brought little.")
    decode = run.benchmark.decode if run.benchmark else None
    if decode:
        said.append(f"{_compared(decode)} plain decoding, {_at_once(decode)}; {_lossless(decode)}.")
    return " ".join(said)


def _compared(decode: Decode) -> str:
    plainly = decode.plain_tokens_per_second
    gain = round(100 * (decode.tokens_per_second / plainly - 1)) if plainly else 0
    return f"{abs(gain)} % {'faster' if gain > 0 else 'slower'} than" if gain else "As fast as"


def _at_once(decode: Decode) -> str:
    return "one prompt at a time" if decode.batch_size == 1 else f"{decode.batch_size} prompts at once"


def _lossless(decode: Decode) -> str:
    if decode.greedy_lossless is None:
        return DRAWN
    if not decode.greedy_lossless:
        return f"the text DIFFERS on {decode.apart_otherwise} prompts"
    ties = (
        f", but for near-ties of two tokens on {decode.apart_at_near_tie} prompts" if decode.apart_at_near_tie else ""
    )
    return f"the text is that of plain greedy decoding{ties}"


def _acceptance(runs: Sequence[Run]) -> list[Chart | Bars]:
    def by_position(named: Sequence[tuple[str, Measured]], title: str) -> Chart:
        series = [
            Series(label=name, style=style, points=list(enumerate(found.acceptance_by_position, 1)))
            for style, (name, found) in enumerate(named)
        ]
        note = "Share of held-out rows where this and all earlier drafts are the target's own choice."
        y_label = "rows accepted up to here"
        return chart(title, "draft position", y_label, series, y_text=percent, from_zero=True, note=note)

    def by_steps(named: Sequence[tuple[str, Measured]], title: str) -> Chart:
        series = [
            Series(
                label=name,
                style=style,
                points=[(0.0, 1.0), *enumerate(found.lengths(), 1)],
                band=[(k, low, high) for k, (low, high) in enumerate(found.intervals or (), 1)],
            )
            for style, (name, found) in enumerate(named)
        ]
        note = (
            "What each further draft step would add when served. Each costs time: it pays where the line still rises."
        )
        if any(one.band for one in series):
            note += " Shaded: the confidence interval."
        return chart(title, "draft steps", "tokens a pass of the target", series, note=note)

    all_runs = [(run.name, run.measured) for run in runs]
    charts: list[Chart | Bars] = [
        by_position(all_runs, "Acceptance by position"),
        by_steps(all_runs, "Acceptance length by draft steps"),
    ]
    for run in runs:
        if run.measured.by_domain:
            of_run = f", {run.name}" if len(runs) > 1 else ""
            domains = list(run.measured.by_domain.items())
            charts.append(by_position(domains, f"Acceptance by position, by domain{of_run}"))
            charts.append(by_steps(domains, f"Acceptance length by domain{of_run}"))
    return charts


def _calibration(runs: Sequence[Run]) -> list[Chart | Bars]:
    series = []
    for style, run in enumerate(runs):
        bins = sorted(run.measured.calibration or (), key=lambda one: one.confidence)
        notes = [
            f"{run.name}: {percent(b.confidence)} sure, {percent(b.accepted)} right, {b.rows:,} rows" for b in bins
        ]
        if bins:
            points = [(one.confidence, one.accepted) for one in bins]
            series.append(Series(label=run.name, style=style, points=points, notes=notes))
    if not series:
        return []
    ideal = Series(label="as sure as right", style=0, points=[(0, 0), (1, 1)], markers=False, straight=True)
    note = "Below the grey line the draft is surer than it is right."
    title, x_label, y_label = "Calibration", "the draft's probability of its choice", "share accepted"
    return [chart(title, x_label, y_label, [ideal, *series], y_text=percent, from_zero=True, whole_x=False, note=note)]


def _decoding(runs: Sequence[Run]) -> list[Chart | Bars]:
    speeds, lengths, greedy = [], [], True
    for style, run in enumerate(runs):
        decode = run.benchmark.decode if run.benchmark else None
        if decode:
            greedy = greedy and decode.greedy_lossless is not None
            before, after, length = decode.plain_tokens_per_second, decode.tokens_per_second, decode.acceptance_length
            speeds.append((f"{_short(run.name)}, plain", [Segment(value=before, style=None, text=plain(before))]))
            speeds.append(
                (f"{_short(run.name)}, with the draft", [Segment(value=after, style=style, text=plain(after))])
            )
            lengths.append((_short(run.name), [Segment(value=length, style=style, text=f"{length:.2f}")]))
    if not speeds:
        return []
    note = f"In process{', greedy' if greedy else ''}. A server's throughput is another matter."
    return [
        Bars(title="Tokens per second", rows=speeds, note=note),
        Bars(title="Acceptance length, tokens a pass of the target", rows=lengths),
    ]


def _training(runs: Sequence[Run]) -> list[Chart | Bars]:
    held_out = [
        Series(label=run.name, style=style, points=[(e, m.acceptance_length) for e, m in run.evaluations.items()])
        for style, run in enumerate(runs)
        if run.evaluations
    ]
    note, y_label = "Epoch 0 is the draft before training.", "tokens a pass of the target"
    return [
        *_curves(runs, "Loss", "loss", "loss"),
        *([chart("Held-out acceptance", "epoch", y_label, held_out, note=note)] if held_out else []),
        *_curves(runs, "Gradient norm", "norm before clipping", "grad_norm"),
        *_curves(runs, "Speed", "tokens per second", "tokens_per_second", from_zero=True),
        *_times(runs),
    ]


def _curves(runs: Sequence[Run], title: str, y_label: str, key: str, from_zero: bool = False) -> list[Chart]:
    """What every step was measured on; one chart, or none."""
    faint, full = list[Series](), list[Series]()
    for style, run in enumerate(runs):
        points: list[Point] = [(step.step, y) for step in run.steps if (y := getattr(step, key)) is not None]
        if points:
            for series, found, is_faint in ((faint, points, True), (full, smoothed(points), False)):
                series.append(Series(label=run.name, style=style, points=thinned(found), markers=False, faint=is_faint))
    if not full:
        return []
    skipped = [(s.step, f"{run.name}: step {s.step} skipped") for run in runs for s in run.steps if not s.applied]
    note = "Faint: every step. Full: running mean." + (" Crosses: skipped steps." if skipped else "")
    logs = not from_zero
    drawn = [*faint, *full]
    return [
        chart(title, "optimizer step", y_label, drawn, crosses=skipped, from_zero=from_zero, may_be_log=logs, note=note)
    ]


def _times(runs: Sequence[Run]) -> list[Bars]:
    shares = [(_short(run.name), spent) for run in runs if (spent := _time_shares(run))]
    names = list(dict.fromkeys(name for _, spent in shares for name in spent))
    styles = {name: style for style, name in enumerate(names, 2)}  # not the colours of the first runs

    def segment(name: str, share: float) -> Segment:
        note = f"{name} {share * 100:.0f} %"
        return Segment(value=share, style=styles[name], text=note if share > 0.2 else "", note=note)

    rows = [(label, [segment(*one) for one in spent.items()]) for label, spent in shares]
    note = "Of the time of all steps: waiting for the target or the data, and the draft's own work."
    return [Bars(title="Where the time goes", rows=rows, legend=list(styles.items()), note=note)] if rows else []


def _short(name: str) -> str:
    """For a label that cannot break into lines: names differ at their end."""
    return name if len(name) <= 40 else "…" + name[-39:]


def _time_shares(run: Run) -> dict[str, float]:
    """Over all steps, each counted by its time."""
    spent, total = dict[str, float](), 0.0
    for step in run.steps:
        if step.time_share and step.tokens_per_second:
            seconds = step.tokens / step.tokens_per_second
            total += seconds
            for name, share in step.time_share.items():
                spent[name] = spent.get(name, 0.0) + max(share, 0.0) * seconds
    return {name: value / total for name, value in spent.items()} if total else {}


def _positions(runs: Sequence[Run]) -> list[Row]:
    """The figures behind the first two charts."""
    most = max(len(run.measured.acceptance_by_position) for run in runs)

    def cells(values: Callable[[Run], Sequence[str]]) -> list[list[str]]:
        return [[*values(run), *[NONE] * most][:most] for run in runs]

    shares = cells(lambda run: [percent(share) for share in run.measured.acceptance_by_position])
    lengths = cells(lambda run: [f"{length:.3f}" for length in run.measured.lengths()])
    return [
        Row(str(k + 1), [cell for own in zip(shares, lengths, strict=True) for cell in (own[0][k], own[1][k])])
        for k in range(most)
    ]


def _overview(runs: Sequence[Run]) -> list[Row]:
    rows = {
        "target": lambda run: run.target,
        "written": lambda run: f"{run.written:%Y-%m-%d %H:%M} UTC",
        "read from": lambda run: str(run.path),
        "epochs finished": lambda run: max(run.evaluations) if run.evaluations else None,
        "optimizer steps": lambda run: f"{len(run.steps):,}" if run.steps else None,
        "of them skipped": lambda run: sum(not step.applied for step in run.steps) if run.steps else None,
        "best epoch": lambda run: run.best_epoch,
        "held-out acceptance length, untrained": lambda run: _length(run.evaluations.get(0)),
        "held-out acceptance length, best epoch": lambda run: _length(run.evaluations.get(run.best_epoch or -1)),
        "acceptance length, benchmark": lambda run: _length(run.benchmark and run.benchmark.teacher_forced),
        "walk length": lambda run: run.measured.walk_length and f"{run.measured.walk_length:.3f}",
        "draft vocabulary covers": lambda run: run.measured.coverage and percent(run.measured.coverage),
        "held-out predictions": lambda run: run.measured.predictions and f"{run.measured.predictions:,}",
        "training tokens per second, median": _speed,
        "decoding: acceptance length": _decoded(lambda found: f"{found.acceptance_length:.3f}"),
        "decoding: tokens per second, plain": _decoded(lambda found: plain(found.plain_tokens_per_second)),
        "decoding: tokens per second, draft": _decoded(lambda found: plain(found.tokens_per_second)),
        "decoding: lossless": _decoded(lambda found: {None: DRAWN, True: "yes", False: "NO"}[found.greedy_lossless]),
        "decoding: equal, near-tie, otherwise apart": _decoded(
            lambda found: (
                None
                if found.greedy_lossless is None
                else f"{found.equal}, {found.apart_at_near_tie}, {found.apart_otherwise} prompts"
            )
        ),
        "decoding: engine, dtype": _decoded(lambda found: f"{found.engine}, {found.dtype}"),
        "server: acceptance length": _served(
            lambda found: f"{found.acceptance_length:.3f}" if found.acceptance_length else "not reported"
        ),
        "server: tokens per second": _served(
            lambda found: ", ".join(f"{at.tokens_per_second:,.0f} at {at.concurrency}" for at in found.levels)
        ),
        "whole demo": lambda run: f"{run.seconds['total']:,.0f} s" if "total" in run.seconds else None,
    }
    found = [Row(label, [_shown(cell(run)) for run in runs]) for label, cell in rows.items()]
    return [row for row in found if set(row.cells) != {NONE}]


def _shown(value: Any) -> str:
    return NONE if value is None else str(value)


def _length(measured: Measured | None) -> str | None:
    if measured is None:
        return None
    between = "{:.3f} to {:.3f}".format(*measured.intervals[-1]) if measured.intervals else ""
    return f"{measured.acceptance_length:.3f}" + (f" ({between})" if between else "")


def _speed(run: Run) -> str | None:
    speeds = [step.tokens_per_second for step in run.steps if step.tokens_per_second is not None]
    return f"{statistics.median(speeds):,.0f}" if speeds else None


def _decoded(text: Callable[[Decode], str | None]) -> Callable[[Run], str | None]:
    return lambda run: text(run.benchmark.decode) if run.benchmark and run.benchmark.decode else None


def _served(text: Callable[[Served], str]) -> Callable[[Run], str | None]:
    return lambda run: text(run.benchmark.served) if run.benchmark and run.benchmark.served else None


def _settings(runs: Sequence[Run]) -> list[Row]:
    """Those that differ first; a benchmark alone has none."""
    trained = [run for run in runs if run.settings]
    keys = list(dict.fromkeys(key for run in trained for key in run.settings))

    def text(run: Run, key: str) -> str:
        value = run.settings.get(key, NONE)
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    rows = [
        Row(key, [text(run, key) for run in runs], differs=len({text(run, key) for run in trained}) > 1) for key in keys
    ]
    return sorted(rows, key=lambda row: not row.differs)
