"""A line of the table, and how a check becomes one."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specforge.errors import first_line

SHORT = {torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A line of the table."""

    what: str
    found: str
    bound: str = ""
    passed: bool | None  # None: skipped


def checked(what: str, work: Callable[..., Iterable[Result]], *arguments: Any) -> list[Result]:
    """The results of work(*arguments). A missing package skips it; any other exception is a failure, with its
    traceback on stderr (the log)."""
    found: list[Result] = []
    try:
        found.extend(work(*arguments))
    except ModuleNotFoundError as error:
        package = str(error.name).split(".")[0]
        if package == "specforge":
            raise
        found.append(Result(what=what, found=f"{package} is not installed", passed=None))
    except Exception as error:
        traceback.print_exc()
        found.append(Result(what=what, found=f"{type(error).__name__}: {first_line(error)}", passed=False))
    return found


def within(what: str, found: dict[str, float], bounds: dict[str, float]) -> Result:
    """Passed if each figure is below its bound. NaN is not."""
    return Result(
        what=what,
        found=", ".join(f"{name} {shown(value)}" for name, value in found.items()),
        bound=", ".join(f"{name} {shown(value)}" for name, value in bounds.items()),
        passed=all(found[name] < bound for name, bound in bounds.items()),
    )


def shown(value: float) -> str:
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.3g}"


def norm_apart(got: Tensor, want: Tensor) -> float:
    """The norm of the difference, relative to that of `want`."""
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    return float((got - want).norm() / want.norm())
