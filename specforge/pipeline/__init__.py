"""One short function a command: the only place where sibling folders meet. Each returns its exit code (None is 0).

Each command's module is imported when it is asked for: some commands need no torch."""

from __future__ import annotations

from importlib import import_module
from typing import Any

COMMANDS = {  # name -> module and function
    "prepare-data": "specforge.pipeline.data:prepare_data",
    "regenerate": "specforge.pipeline.regeneration:regenerate",
    "plan": "specforge.pipeline.planning:plan",
    "prepare-hidden": "specforge.pipeline.capture:prepare_hidden",
    "store verify": "specforge.pipeline.stores:store_verify",
    "store info": "specforge.pipeline.stores:store_info",
    "store merge": "specforge.pipeline.stores:store_merge",
    "train": "specforge.pipeline.training:train",
    "check": "specforge.pipeline.checking:check",
    "export": "specforge.pipeline.exporting:export",
    "benchmark": "specforge.pipeline.serving:benchmark",
    "report": "specforge.pipeline.reporting:report",
    "demo": "specforge.demo:run",
    "doctor": "specforge.doctor:run",
    "doctor --gpu": "specforge.pipeline.gpu.command:check_gpu",
}


def run(command: str, settings: Any) -> int | None:
    if command == "doctor" and settings.gpu:
        command = "doctor --gpu"
    module, function = COMMANDS[command].split(":")
    return getattr(import_module(module), function)(settings)
