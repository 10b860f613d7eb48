"""One short function a command: the only place where sibling folders meet. Each returns its exit code (None is 0)."""

from __future__ import annotations

from specforge.config import DemoSettings, DoctorSettings
from specforge.pipeline.capture import prepare_hidden
from specforge.pipeline.data import prepare_data, regenerate
from specforge.pipeline.planning import plan
from specforge.pipeline.proof import benchmark
from specforge.pipeline.stores import store_info, store_merge, store_verify
from specforge.pipeline.training import train

__all__ = [
    "benchmark",
    "demo",
    "doctor",
    "plan",
    "prepare_data",
    "prepare_hidden",
    "regenerate",
    "store_info",
    "store_merge",
    "store_verify",
    "train",
]


def demo(settings: DemoSettings) -> int | None:
    from specforge import demo as demonstration

    demonstration.run(settings)
    return None


def doctor(settings: DoctorSettings) -> int | None:
    from specforge import doctor as doctoring

    return doctoring.report()
