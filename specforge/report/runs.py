"""The files of a run, read and checked: settings, metrics, benchmark."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, FiniteFloat, ValidationError

from specforge.errors import TrainingError
from specforge.files import parse_json, read_json


def _finite(value: object) -> object:
    """A skipped step's loss may be null, or NaN in a file that another program wrote."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_finite)]
Model = TypeVar("Model", bound=BaseModel)


class Step(BaseModel):
    """An optimizer step."""

    step: int
    loss: Number = None
    grad_norm: Number = None
    applied: bool = True
    tokens: int = 0
    tokens_per_second: Number = None
    time_share: dict[str, FiniteFloat] | None = None


class Bin(BaseModel):
    """Drafts of like confidence."""

    confidence: FiniteFloat
    accepted: FiniteFloat
    rows: int


class Measured(BaseModel):
    """Teacher-forced acceptance on held-out text; `records.Acceptance` writes it. What is None was not measured."""

    acceptance_length: FiniteFloat
    acceptance_by_position: list[FiniteFloat] = Field(min_length=1)
    walk_length: FiniteFloat | None = None
    coverage: FiniteFloat | None = None
    predictions: int | None = None
    intervals: list[tuple[FiniteFloat, FiniteFloat]] | None = None  # of the length after 1, 2, .. draft steps
    by_domain: dict[str, Measured] | None = None
    calibration: list[Bin] | None = None

    def lengths(self) -> list[float]:
        """Acceptance length after 1, 2, .. draft steps."""
        shares = self.acceptance_by_position
        return [1 + sum(shares[: k + 1]) for k in range(len(shares))]


class Evaluation(BaseModel):
    epoch: int
    held_out: Measured


class Decode(BaseModel):
    """Real speculative decoding beside plain decoding."""

    acceptance_length: FiniteFloat
    greedy_lossless: bool | None = None  # None: drawn, so not compared
    tokens_per_second: FiniteFloat
    plain_tokens_per_second: FiniteFloat
    engine: str = ""
    dtype: str = ""
    batch_size: int = 1
    equal: int = 0
    apart_at_near_tie: int = 0
    apart_otherwise: int = 0


class Level(BaseModel):
    """So many questions at once."""

    concurrency: int
    tokens_per_second: FiniteFloat


class Served(BaseModel):
    """Through a server."""

    acceptance_length: FiniteFloat | None = None  # None: it reports none
    levels: list[Level] = []


class Benchmark(BaseModel):
    draft: str = ""
    target: str = ""
    teacher_forced: Measured
    decode: Decode | None = None
    served: Served | None = None


class RunFile(BaseModel):
    settings: dict[str, Any]
    recipe: dict[str, Any] = Field(default_factory=dict)


class Summary(BaseModel):
    """Of the demo."""

    seconds: dict[str, FiniteFloat] = {}


@dataclass(kw_only=True)
class Run:
    """`name` is set by `read`: it tells the runs of one report apart."""

    path: Path
    target: str
    written: datetime
    name: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    evaluations: dict[int, Measured] = field(default_factory=dict)  # by epoch; 0 is the untrained draft
    benchmark: Benchmark | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def best_epoch(self) -> int | None:
        """The epoch that training kept as `best`: by simulated decoding length."""
        trained = [epoch for epoch in self.evaluations if epoch > 0]
        return max(trained, key=self._decoding_length, default=None)

    def _decoding_length(self, epoch: int) -> float:
        found = self.evaluations[epoch]
        return found.acceptance_length if found.walk_length is None else found.walk_length

    @property
    def measured(self) -> Measured:
        """The benchmark's, which is of the best draft, else the best epoch's."""
        if self.benchmark:
            return self.benchmark.teacher_forced
        assert self.best_epoch is not None
        return self.evaluations[self.best_epoch]


def read(paths: Sequence[Path]) -> list[Run]:
    """A path is a training's output folder, a folder that holds one as draft/ (the demo's), or a benchmark's JSON file.
    A training's benchmark is benchmark.json in its folder, else the one in the folder above if its draft is this one.
    """
    places = [Path(os.path.abspath(path)) for path in paths]
    for place in places:
        if [one.resolve() for one in places].count(place.resolve()) > 1:
            raise _error("the run is given twice", place, "give each run once")
    runs = [_benchmark_alone(place) if place.is_file() else _run(place) for place in places]
    for run, name in zip(runs, _names(places), strict=True):
        run.name = name.encode("utf-8", "replace").decode("utf-8")
    return runs


def _names(places: Sequence[Path]) -> list[str]:
    """As many last parts of each path as tell them all apart."""
    for count in range(1, max(len(place.parts) for place in places)):
        names = ["/".join(place.parts[-count:]) for place in places]
        if len(set(names)) == len(names):
            return names
    return [str(place) for place in places]


def _run(place: Path) -> Run:
    folder = place if (place / "run.json").is_file() else place / "draft"
    if not (folder / "run.json").is_file():
        raise _error("this is no run", place, "give a folder that `specforge train` or `specforge demo` wrote")
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise _error("the run has no metrics yet", metrics, "wait for the end of its first epoch")
    run = _load(folder / "run.json", RunFile)
    settings = run.settings | run.recipe  # what `auto` chose, in its place
    steps, evaluations = _metrics(metrics)
    if not any(epoch > 0 for epoch in evaluations):
        raise _error("no epoch of the run is finished", metrics, "wait for the end of its first epoch")
    summary = place / "summary.json"
    return Run(
        path=place,
        target=str(settings.get("model_path")),
        written=_written(metrics),
        settings=settings,
        steps=steps,
        evaluations=evaluations,
        benchmark=_benchmark(folder),
        seconds=_load(summary, Summary).seconds if folder != place and summary.is_file() else {},
    )


def _benchmark(folder: Path) -> Benchmark | None:
    own, above = folder / "benchmark.json", folder.parent / "benchmark.json"
    if own.is_file():
        return _load(own, Benchmark)
    found = _load(above, Benchmark) if above.is_file() else None
    return found if found and folder.name in Path(found.draft).parts[-2:] else None


def _benchmark_alone(file: Path) -> Run:
    found = _load(file, Benchmark)
    return Run(path=file, target=found.target, written=_written(file), benchmark=found)


def _metrics(path: Path) -> tuple[list[Step], dict[int, Measured]]:
    """Later lines stand for earlier ones of the same step or epoch. A last line that is cut is left out."""
    steps, evaluations = dict[int, Step](), dict[int, Measured]()
    *lines, last = path.read_bytes().split(b"\n")
    for number, line in enumerate([*lines, last], 1):
        where = f"{path}, line {number}"
        try:
            row = parse_json(line)
        except ValueError as error:
            if number > len(lines):
                break
            raise _error("a line is no JSON", where, "restore the file from a copy, or delete the line") from error
        if isinstance(row, dict) and "held_out" in row:
            evaluation = _checked(row, Evaluation, where)
            evaluations[evaluation.epoch] = evaluation.held_out
        else:
            step = _checked(row, Step, where)
            steps[step.step] = step
    return [steps[number] for number in sorted(steps)], dict(sorted(evaluations.items()))


def _load(path: Path, model: type[Model]) -> Model:
    try:
        content = read_json(path)
    except ValueError as error:
        raise _error("the file is no JSON", path, "restore it from a copy, or write it anew") from error
    return _checked(content, model, str(path))


def _checked(content: object, model: type[Model], where: str) -> Model:
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        if model is Benchmark and key == "teacher_forced" and isinstance(content, dict) and "served" in content:
            raise _error("the benchmark measured a server alone", where, "give it --draft and --data, too") from error
        place = f"{where}, '{key}'" if key else where
        fix = "give a file that specforge wrote; mend or delete it where it was damaged"
        raise _error(f"what stands there is not what a run writes: {first['msg'].lower()}", place, fix) from error


def _written(path: Path) -> datetime:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC)


def _error(what: str, where: Path | str, fix: str) -> TrainingError:
    return TrainingError(what, where=str(where), fix=fix)
