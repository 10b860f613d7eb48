"""`specforge doctor --gpu`: all checks on every card, one table."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table

from specforge import console, launch
from specforge.config import DoctorSettings
from specforge.console import is_main_rank, say
from specforge.errors import ConfigError, EngineError
from specforge.pipeline.gpu.made_up import MEMORY_SIZE, SIZE, Size, make_target
from specforge.pipeline.gpu.results import SHORT, Result, checked
from specforge.records import Ranks

ENGINE_TIMEOUT = 300  # seconds for one engine's checks, its start included
RANK_TIMEOUT = "300"  # seconds that a rank waits in a collective: another one may have failed before it
DTYPES = (torch.bfloat16, torch.float32)


def check_gpu(settings: DoctorSettings) -> int | None:
    if not torch.cuda.is_available():
        raise ConfigError(
            "--gpu needs a GPU, and torch sees none here",
            where=f"torch {torch.__version__}, built for CUDA {torch.version.cuda}",
            fix="run it on a machine with a GPU, its driver, and a torch that is built for CUDA",
        )
    os.environ.setdefault("SPECFORGE_TIMEOUT", RANK_TIMEOUT)
    code = launch.start_ranks(1)
    if code is not None:
        return code
    ranks = launch.join(1)
    folder = Path(shared(tempfile.mkdtemp(prefix="specforge-gpu-") if is_main_rank() else ""))
    console.quiet(folder / ("specforge.log" if is_main_rank() else f"specforge-rank{ranks.rank}.log"))
    results = of_all_ranks(run_checks(ranks, folder, settings.model_path), ranks)
    dist.barrier()
    dist.destroy_process_group()
    failed = [result.what for result in results if result.passed is False]
    if not is_main_rank():
        return 2 if failed else None
    console.console.print(as_table(results, ranks))
    if failed:
        raise EngineError(
            f"{len(failed)} of {len(results)} checks failed: {'; '.join(failed)}",
            where=str(folder),
            fix="read the logs there (tracebacks of what raised), and report them with this table",
        )
    shutil.rmtree(folder)
    skipped = sum(result.passed is None for result in results)
    say(f"{len(results) - skipped} checks passed" + (f", {skipped} skipped" if skipped else ""))
    return None


def as_table(results: Iterable[Result], ranks: Ranks) -> Table:
    title = f"{ranks.world} x {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "CPU"
    table = Table("", "what", "found", "bound", title=title, title_justify="left")
    marks = {True: "[green]passed[/]", False: "[red]failed[/]", None: "[yellow]skipped[/]"}
    for result in results:
        found = f"skipped: {result.found}" if result.passed is None else result.found
        table.add_row(marks[result.passed], result.what, found, result.bound)
    return table


def run_checks(
    ranks: Ranks,
    folder: Path,
    model_path: str | None,
    size: Size = SIZE,
    memory_size: Size = MEMORY_SIZE,
    dtypes: Iterable[torch.dtype] = DTYPES,
) -> list[Result]:
    """This rank's results. Every rank makes the same checks in the same order. A module is imported with its check: it
    may need a package that is missing."""
    device = ranks.device
    on_gpu = device.type == "cuda"
    found = list[Result]()
    for dtype in dtypes:
        found += checked(f"attention, {SHORT[dtype]}", _check, "attention", "attention", device, dtype, size)
    for kind in ("plain", "DeepSpeed"):
        for dtype in dtypes:
            what = f"training step, {kind}, {SHORT[dtype]}"
            found += checked(what, _check, "training", "training_step", kind, dtype, ranks, size)
        if on_gpu:
            found += checked(f"host waits, training step, {kind}", _check, "waits", "training_waits", kind, ranks, size)
    for kind in ("none", "DeepSpeed") if on_gpu else ():
        found += checked(f"peak memory, {kind}", _check, "training", "memory", kind, ranks, memory_size)
    if on_gpu:
        torch.cuda.empty_cache()  # for the engines
    return found + of_target(ranks, folder, model_path, size, dtypes)


def _check(module: str, name: str, *arguments: Any) -> list[Result]:
    found = getattr(import_module(f"specforge.pipeline.gpu.{module}"), name)(*arguments)
    return found if isinstance(found, list) else [found]


# ---- the target


def of_target(
    ranks: Ranks, folder: Path, model_path: str | None, size: Size, dtypes: Iterable[torch.dtype]
) -> list[Result]:
    """Each engine of SGLang in a process of its own: a process takes one, and a crash there ends no other check."""
    from specforge.target import engine as engines

    target = model_path or str(folder / "target")
    if model_path is None and is_main_rank():
        make_target(folder / "target", torch.float32, size.config)
    dist.barrier()
    if engines.sglang_problem() == "sglang is not installed":
        skipped = [
            Result(what=what, found="sglang is not installed", passed=None)
            for what in ("states of sglang", "host waits, capture", "lossless decoding in sglang")
        ]
        return skipped + checked("lossless decoding in hf, fp32", _check, "target", "through_hf", ranks, target)
    found = list[Result]()
    tp_size = largest_tp(target, ranks.world)
    for number, dtype in enumerate(dtypes, start=1):
        found += in_process(f"sglang, {SHORT[dtype]}", _engine_checks, (number, ranks, tp_size, target, dtype, folder))
    return found


def largest_tp(model_path: str, world: int) -> int:
    """All ranks if the target's heads can be shared so, else 1."""
    from specforge.target import engine as engines
    from specforge.target import weights

    try:
        engines.check_tp(weights.describe(model_path), world)
    except ConfigError:
        return 1
    return world


def in_process(
    what: str, work: Callable[..., list[Result]], arguments: tuple[Any, ...], timeout: float = ENGINE_TIMEOUT
) -> list[Result]:
    """work(*arguments) in a new process; a failure if that ends without results, or not in time."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, work, arguments))
    process.start()
    sender.close()
    failure = f"no results in {timeout:.0f} s"
    try:
        if receiver.poll(timeout):
            return list(receiver.recv())
    except EOFError:
        process.join(10)
        failure = f"its process ended with exit code {process.exitcode}"
    finally:
        process.join(10)
        if process.is_alive():
            process.kill()
            process.join()
    return [Result(what=what, found=failure, passed=False)]


def _send(sender: Connection, work: Callable[..., list[Result]], arguments: tuple[Any, ...]) -> None:
    try:
        sender.send(work(*arguments))
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sender.close()


def _engine_checks(
    number: int, ranks: Ranks, tp_size: int, model_path: str, dtype: torch.dtype, folder: Path
) -> list[Result]:
    """In a process of its own, which joins those of the other ranks in the launcher's store, under names of their
    own."""
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)
    if launch.LAUNCHED in os.environ:
        os.environ[launch.LAUNCHED] = str(os.getppid())
    console.quiet(folder / f"engine-{SHORT[dtype]}-rank{ranks.rank}.log")
    what = f"sglang, {SHORT[dtype]}"
    return checked(what, lambda: _check("target", "through_sglang", launch.join(tp_size), model_path, dtype))


# ---- several ranks


def shared(text: str) -> str:
    """Rank 0's, on all ranks."""
    content = [text]
    dist.broadcast_object_list(content, 0)
    return content[0]


def of_all_ranks(results: list[Result], ranks: Ranks) -> list[Result]:
    """By name, the worst of all ranks': one that failed before one that passed."""
    every: list[list[Result]] = [[] for _ in range(ranks.world)]
    dist.all_gather_object(every, results)
    found = dict[str, Result]()
    for rank, of_rank in enumerate(every):
        for result in of_rank:
            kept = found.setdefault(result.what, result)
            if result.passed is False and kept.passed is not False:
                found[result.what] = Result(
                    what=result.what, found=f"rank {rank}: {result.found}", bound=result.bound, passed=False
                )
    return list(found.values())
