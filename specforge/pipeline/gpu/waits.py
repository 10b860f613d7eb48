"""Where the host waits for the device, in a training step and in a capture pass."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Sequence

import torch

from specforge.pipeline.gpu.made_up import SIZE, Size, draft_step, made_up, random_examples
from specforge.pipeline.gpu.results import Result
from specforge.pipeline.gpu.training import make_optimizer, train_once
from specforge.records import FeatureBatch, Ranks, TargetEngine

SYNCHRONISING = "called a synchronizing CUDA operation"  # torch's warning
PACKAGES = ("specforge", "sglang", "deepspeed")
# The one reading of a step: loss, counts and gradient norm, which decide whether it is applied and go to the log.
STEP_WAITS = {"specforge/train/optimizer.py read": 1}
# The teacher's top-1 goes to the host with the record, once a pass.
CAPTURE_WAITS = {"specforge/target/sglang/engine.py _capture": 1}


def host_waits(work: Callable[[], object], mode: Callable[[str], object] | None = None) -> list[str]:
    """Where the host waited for the device in work(): "FILE FUNCTION" of the innermost frame of `PACKAGES`. `mode`
    stands for torch.cuda.set_sync_debug_mode. (The waits of a backward show at its call.)"""
    mode = mode or torch.cuda.set_sync_debug_mode
    found = []

    def note(message: Warning | str, *_: object, **__: object) -> None:
        if SYNCHRONISING in str(message):
            frames = [(f.filename, f.name) for f in traceback.extract_stack()]
            own = [(part, name) for file, name in frames if (part := _in_package(file)) and name != "host_waits"]
            found.append(" ".join(own[-2 if own[-1][1] == "note" else -1]))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        mode("warn")
        try:
            work()
        finally:
            mode("default")
    return found


def _in_package(file: str) -> str | None:
    """The path from the package on, if the file belongs to one of `PACKAGES`."""
    parts = file.split("/")
    for at in range(len(parts) - 2, -1, -1):
        if parts[at] in PACKAGES:
            return "/".join(parts[at:])
    return None


def waits(what: str, places: Sequence[str], allowed: dict[str, int]) -> Result:
    """Passed if specforge itself waits nowhere but as `allowed`. What other packages do is counted, and not judged."""
    own = [place for place in places if place.startswith("specforge/")]
    more = {place: own.count(place) for place in own if own.count(place) > allowed.get(place, 0)}
    others = len(places) - len(own)
    found = f"{len(own)} of specforge"
    if others:
        found += f", {others} of the library"
    if more:
        found += ": " + ", ".join(f"{count} in {place}" for place, count in more.items())
    listed = ", ".join(f"{count} in {place}" for place, count in allowed.items())
    return Result(what=f"host waits, {what}", found=found, bound=listed, passed=not more)


def training_waits(kind: str, ranks: Ranks, size: Size = SIZE, mode: Callable[[str], object] | None = None) -> Result:
    head, kept_D, records = made_up(size)
    step = draft_step(size, head, kept_D, ranks.device, torch.bfloat16)
    optimizer = make_optimizer(kind, step, torch.bfloat16, ranks)
    batch = FeatureBatch.pack(records, ranks.device, torch.bfloat16)
    train_once(step, optimizer, batch, ranks.device)  # what is done once, such as moving the rotary frequencies
    places = host_waits(lambda: train_once(step, optimizer, batch, ranks.device), mode)
    return waits(f"training step, {kind}", places, STEP_WAITS)


def capture_waits(engine: TargetEngine, mode: Callable[[str], object] | None = None) -> Result:
    asked = random_examples(engine.info.vocab_size)
    engine.capture(asked)
    return waits(f"capture in {engine.name}", host_waits(lambda: engine.capture(asked), mode), CAPTURE_WAITS)
