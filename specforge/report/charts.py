"""Points to the geometry of a chart. The template draws it, and escapes every text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

Point = tuple[float, float]
WIDTH, HEIGHT = 440, 270  # units of the view box, the same as CSS pixels where the page has room
LEFT, RIGHT, TOP, BOTTOM = 52, 428, 30, 226  # of the plotted area
STYLES = 6  # colours, dashes and markers that the template knows
KEPT = 300  # points of a line; more cannot be told apart
LOG_FROM = 5  # an axis is logarithmic where the highest value is so many times the lowest


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line, with markers or faint; `band` is (x, low, high)."""

    label: str
    style: int
    points: Sequence[Point]
    markers: bool = True
    faint: bool = False
    straight: bool = False  # a reference, grey
    band: Sequence[tuple[float, float, float]] = ()
    notes: Sequence[str] = ()  # for each marker, shown where it is pointed at


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A series in view-box units."""

    series: Series
    path: str
    band: str
    markers: list[tuple[float, float, str]]  # x, y, note


@dataclass(frozen=True, kw_only=True)
class Chart:
    title: str
    x_label: str
    y_label: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    drawn: list[Drawn]
    crosses: list[tuple[float, str]]
    note: str = ""

    @property
    def legend(self) -> list[Series]:
        return [drawn.series for drawn in self.drawn if not drawn.series.faint]


@dataclass(frozen=True, kw_only=True)
class Segment:
    """`style` None is grey, as what others are compared with."""

    value: float
    style: int | None
    text: str
    note: str = ""  # shown where it is pointed at
    x: float = 0.0
    width: float = 0.0


@dataclass(kw_only=True)
class Bars:
    """Horizontal bars, each of segments that follow one another."""

    title: str
    rows: list[tuple[str, list[Segment]]]
    legend: list[tuple[str, int]] = field(default_factory=list)
    note: str = ""

    def __post_init__(self) -> None:
        longest = max((sum(one.value for one in segments) for _, segments in self.rows), default=0) or 1
        room = WIDTH - 2 if self.legend else WIDTH - 100  # without a legend the values stand behind the bars
        self.rows = [(label, list(_laid(segments, room / longest))) for label, segments in self.rows]


def _laid(segments: Sequence[Segment], scale: float) -> Iterator[Segment]:
    x = 0.0
    for one in segments:
        width = round(one.value * scale, 1)
        yield replace(one, x=round(x, 1), width=width)
        x += width


def percent(value: float) -> str:
    return f"{100 * value:.3g} %"


def plain(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.4g}"


def chart(
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    *,
    crosses: Sequence[tuple[float, str]] = (),
    y_text: Callable[[float], str] = plain,
    from_zero: bool = False,
    may_be_log: bool = False,
    whole_x: bool = True,
    note: str = "",
) -> Chart:
    """`crosses` are (x, note), marked on the x axis. With `whole_x` only whole numbers stand there."""
    xs = [x for one in series for x, _ in one.points] + [x for x, _ in crosses]
    ys = [y for one in series for _, y in one.points] + [y for one in series for _, *ends in one.band for y in ends]
    log = may_be_log and min(ys) > 0 and max(ys) >= LOG_FROM * min(ys)
    x_low, x_high = _apart(min(xs), max(xs))
    y_low, y_high = _apart(min([*ys, 0.0] if from_zero else ys), max(ys))
    y_values = _log_ticks(y_low, y_high) if log else _ticks(y_low, y_high, whole=False)
    if not log:
        y_low, y_high = min(y_low, y_values[0]), max(y_high, y_values[-1])

    def x_at(x: float) -> float:
        return round(LEFT + (x - x_low) / (x_high - x_low) * (RIGHT - LEFT), 1)

    def y_at(y: float) -> float:
        low, high, y = (math.log(y_low), math.log(y_high), math.log(y)) if log else (y_low, y_high, y)
        return round(BOTTOM - (y - low) / (high - low) * (BOTTOM - TOP), 1)

    def path(points: Sequence[Point]) -> str:
        """A single point is a line onto itself: a dot."""
        points = [*points, *points] if len(points) == 1 else points
        return "M" + "L".join(f"{x_at(x):g} {y_at(y):g}" for x, y in points) if points else ""

    def drawn(one: Series) -> Drawn:
        notes = one.notes or [f"{one.label}: {x_label} {plain(x)}, {y_text(y)}" for x, y in one.points]
        edge = [(x, high) for x, _, high in one.band] + [(x, low) for x, low, _ in reversed(one.band)]
        return Drawn(
            series=one,
            path=path(one.points),
            band=path(edge),
            markers=[(x_at(x), y_at(y), n) for (x, y), n in zip(one.points, notes, strict=True)] if one.markers else [],
        )

    return Chart(
        title=title,
        x_label=x_label,
        y_label=y_label + (", log scale" if log else ""),
        x_ticks=[(x_at(x), plain(x)) for x in _ticks(x_low, x_high, whole_x) if x_low <= x <= x_high],
        y_ticks=[(y_at(y), y_text(y)) for y in y_values],
        drawn=[drawn(one) for one in series],
        crosses=[(x_at(x), text) for x, text in crosses],
        note=note,
    )


def smoothed(points: Sequence[Point]) -> list[Point]:
    """The mean of a window around each point, a twentieth of the line, narrower towards its ends: nothing lags."""
    sums = [0.0, *accumulate(y for _, y in points)]
    found = list[Point]()
    for at, (x, _) in enumerate(points):
        half = min(len(points) // 40, at, len(points) - 1 - at)
        found.append((x, (sums[at + half + 1] - sums[at - half]) / (2 * half + 1)))
    return found


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most about KEPT points, each extreme of the line among them."""
    if len(points) <= KEPT:
        return list(points)
    size = math.ceil(2 * len(points) / KEPT)
    groups = [points[at : at + size] for at in range(0, len(points), size)]
    ends = [points[0], points[-1]]
    return sorted({*ends, *(choose(group, key=lambda p: p[1]) for group in groups for choose in (min, max))})


def _apart(low: float, high: float) -> Point:
    """A range that has a width."""
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _ticks(low: float, high: float, whole: bool) -> list[float]:
    """Round numbers that enclose the range."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    size = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    if whole:
        size = 1.0 if high - low <= 16 else max(1.0, size)
    return [round(n * size, 10) for n in range(math.floor(low / size), math.ceil(high / size) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [float(f"{factor}e{e}") for e in exponents for factor in factors if low <= factor * 10.0**e <= high]
        if len(found) <= 7:
            break
    if len(found) < 4:
        return [y for y in _ticks(low, high, whole=False) if low <= y <= high]
    return found[:: math.ceil(len(found) / 7)]
