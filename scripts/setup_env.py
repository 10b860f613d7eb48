"""Make, renew or mend the project's virtual environment: `python3 scripts/setup_env.py`, or `make env`.

Silent and quick where nothing is to be done. Standard library only: it runs before anything is installed.

The environment is ready when .venv/.specforge-ready names the present inputs (pyproject.toml, requirements/*.txt, the
Python version) and `find_faults` sees nothing wrong. Every run goes the same way, from nothing or from something:

    lock -> find faults -> python, pip -> torch.txt -> cpu.txt -> specforge -> find faults again -> stamp

A distribution with files missing is first removed, so that pip sees it as absent and installs it again.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SUPPORTED = ((3, 11), (3, 12))
OWN = "specforge"
ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / ".specforge-ready"
LOCK = ROOT / ".venv.lock"
SITE = VENV / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
TORCH = ROOT / "requirements" / "torch.txt"
CPU = ROOT / "requirements" / "cpu.txt"


class SetupError(Exception):
    """What went wrong, where, and how to mend it."""

    def __init__(self, what: str, where: object, fix: str) -> None:
        super().__init__(f"set-up failed: {what}\n  where: {where}\n  fix:   {fix}")


# --- what should be there -------------------------------------------------------------------------------------------


def pins(path: Path) -> dict[str, str]:
    """The lines `name==version` of a requirements file; names as normalised by PEP 503."""
    found = {}
    for line in path.read_text().splitlines():
        line = line.split("#")[0].strip()
        if line:
            name, equals, version = line.partition("==")
            if not equals:
                raise SetupError(f"'{line}' is not pinned", path, "write it as name==version")
            found[normal(name)] = version.strip()
    return found


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower().strip()


def inputs_hash() -> str:
    digest = hashlib.sha256(f"python {sys.version_info[:2]}".encode())
    for path in [ROOT / "pyproject.toml", *sorted((ROOT / "requirements").glob("*.txt"))]:
        digest.update(f"\0{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()


# --- what is there --------------------------------------------------------------------------------------------------


@dataclass
class Faults:
    """What keeps the environment from being ready; all empty when it is."""

    python: str = ""  # why .venv/bin/python does not serve
    rebuild: bool = False  # nothing in .venv can be kept
    broken: dict[str, Path] = field(default_factory=dict)  # distribution -> its .dist-info, or what is left of it
    missing: list[str] = field(default_factory=list)  # pinned, but absent or of another version
    own: bool = False  # the editable install of specforge is absent or points elsewhere

    def __bool__(self) -> bool:
        return bool(self.python or self.broken or self.missing or self.own)

    def __str__(self) -> str:
        parts = [self.python] if self.python else []
        for names, what in (
            (self.broken.keys() - {"pip"}, "files missing of"),
            (self.missing, "not installed as pinned:"),
        ):
            if names:
                parts.append(f"{what} {', '.join(sorted(names)[:4])}{', ...' if len(names) > 4 else ''}")
        if self.own and not parts:
            parts.append(f"{OWN} itself is not installed from {ROOT}")
        return "; ".join(parts)


def find_faults() -> Faults:
    """Looks at every recorded file (40,000 in about 0.2 s), and runs the environment's Python once."""
    faults = Faults()
    faults.python, faults.rebuild, own_origin = probe_python()
    if faults.rebuild:
        return faults

    pinned = {**pins(TORCH), **pins(CPU)}
    infos = {normal(info.name.split("-")[0]): info for info in SITE.glob("*.dist-info")}
    ours = {*pinned, OWN, "pip"} & infos.keys()  # what else someone installed here is not our business
    faults.broken = {name: infos[name] for name in ours if not is_whole(infos[name])}
    if "pip" not in infos or "pip" in faults.broken:
        faults.python = faults.python or "pip is missing or broken"
    for name, version in pinned.items():
        if name not in faults.broken and (name not in infos or version_of(infos[name]) != version):
            faults.missing.append(name)
    faults.own = OWN not in infos or OWN in faults.broken or not own_origin.startswith(f"{ROOT / OWN}{os.sep}")
    return faults


def probe_python() -> tuple[str, bool, str]:
    """(what is wrong with .venv/bin/python, must all be rebuilt, where it finds specforge)."""
    if not VENV.exists():
        return "there is no .venv yet", True, ""
    if not SITE.is_dir():
        return f".venv was not made by Python {sys.version_info[0]}.{sys.version_info[1]}, or is half made", True, ""
    with contextlib.suppress(OSError):
        if f"{VENV}/bin/" not in (VENV / "bin" / "pip").read_text()[:1000]:
            return ".venv was made in another folder and moved", True, ""
    code = (
        "import sys, importlib.util as util; spec = util.find_spec(sys.argv[1]);"
        "print(*sys.version_info[:2], sys.prefix, spec and spec.origin, sep='\\n')"
    )
    try:
        done = subprocess.run([PYTHON, "-I", "-c", code, OWN], capture_output=True, text=True, timeout=60)
        major, minor, prefix, origin = done.stdout.strip().split("\n")
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return f"{PYTHON.relative_to(ROOT)} does not run", False, ""
    if (int(major), int(minor), prefix) != (*sys.version_info[:2], str(VENV)):
        return f"{PYTHON.relative_to(ROOT)} is Python {major}.{minor} of {prefix}", True, ""
    return "", False, origin


def is_whole(info: Path) -> bool:
    """Whether every file that a distribution's RECORD names is there. pip writes RECORD last."""
    files = recorded(info)
    return bool(files) and (info / "METADATA").exists() and all(map(os.path.exists, files))


def recorded(info: Path) -> list[str]:
    """The files of a distribution, less compiled ones, which come and go."""
    try:
        with open(info / "RECORD", newline="", encoding="utf-8") as lines:
            names = [row[0] for row in csv.reader(lines) if row]
    except (OSError, UnicodeDecodeError, csv.Error):
        return []
    return [os.path.join(info.parent, name) for name in names if not name.endswith(".pyc")]


def version_of(info: Path) -> str:
    """The version, less a local part: 2.13.0+cpu is 2.13.0."""
    for line in (info / "METADATA").read_text(encoding="utf-8").splitlines():
        if line.startswith("Version:"):
            return line.split(":", 1)[1].partition("+")[0].strip()
    return ""


# --- making it so ---------------------------------------------------------------------------------------------------


def make_ready() -> None:
    """The whole way. What is already right is left alone; a second round mends what the first one uncovered."""
    wanted, stamp, faults = inputs_hash(), read_stamp(), find_faults()
    if stamp.get("inputs") == wanted and not faults:
        return
    say(f"set-up: {explain(stamp, wanted, faults)}")
    faults.own |= stamp.get("inputs") != wanted  # its metadata may have changed
    started = time.monotonic()
    for _ in range(2):
        mend(faults)
        drop_unpinned(stamp.get("pins", []))
        faults = find_faults()
        if not faults:
            break
    else:
        raise SetupError(f"still wrong after two tries: {faults}", VENV, f"rm -rf {VENV}; make env")
    write_stamp(wanted)
    say(f"set-up: ready after {time.monotonic() - started:.0f} s")


def explain(stamp: dict[str, Any], wanted: str, faults: Faults) -> str:
    if not VENV.exists():
        return f"making {VENV.relative_to(ROOT)} with Python {sys.version.split()[0]} (about 3 GB, a few minutes)"
    if not stamp:
        return f"an earlier set-up did not finish ({faults or 'no stamp'}); going on with it"
    if stamp.get("inputs") != wanted and not faults.python and not faults.broken:
        return "pyproject.toml or requirements/ changed; renewing"
    return f"{faults}; mending"


def mend(faults: Faults) -> None:
    if faults.rebuild and VENV.exists():
        with stage("removing the old .venv"):
            shutil.rmtree(VENV)
    for info in faults.broken.values():
        remove(info)
    for leftover in SITE.glob("~*"):  # what pip moved aside when it was killed
        shutil.rmtree(leftover, ignore_errors=True)
    if faults.rebuild or faults.python:
        with stage("python and pip"):
            run([sys.executable, "-m", "venv", str(VENV)])
    torch, others = pins(TORCH).keys(), pins(CPU).keys()
    absent = torch | others if faults.rebuild else {*faults.missing, *faults.broken}
    if absent & torch:
        with stage("torch and what it needs"):
            install("-r", str(TORCH))
    if absent & others:
        with stage(f"{len(absent & others)} of {len(others)} other packages"):
            install("--no-deps", "-r", str(CPU))
    if faults.own or faults.rebuild:
        with stage(OWN):
            install("--no-deps", "--no-build-isolation", "-e", str(ROOT))


def remove(info: Path) -> None:
    """Take a broken distribution away by hand: pip refuses to touch one whose RECORD is gone."""
    for name in recorded(info):
        path = os.path.normpath(name)
        if path.startswith(f"{VENV}{os.sep}"):
            with contextlib.suppress(OSError):
                os.unlink(path)
    shutil.rmtree(info, ignore_errors=True)


def drop_unpinned(earlier: list[str]) -> None:
    """Uninstall what an earlier set-up put in and the present pins no longer name."""
    gone = sorted(set(earlier) - pins(TORCH).keys() - pins(CPU).keys())
    if gone:
        with stage(f"removing {', '.join(gone)}"):
            run([str(PYTHON), "-m", "pip", "uninstall", "-y", *gone])


def read_stamp() -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        stamp = json.loads(STAMP.read_text())
        if isinstance(stamp, dict):
            return stamp
    return {}


def write_stamp(inputs: str) -> None:
    stamp = {"inputs": inputs, "pins": sorted({**pins(TORCH), **pins(CPU)})}
    temporary = STAMP.with_suffix(".tmp")
    temporary.write_text(json.dumps(stamp, indent=1) + "\n")
    temporary.replace(STAMP)


# --- running things -------------------------------------------------------------------------------------------------


lock_fds: list[int] = []  # filled by `lock`, inherited by what `run` starts


def install(*what: str) -> None:
    # Nothing is compiled ahead: Python compiles what is imported, a fraction of the 20,000 files installed.
    run([str(PYTHON), "-m", "pip", "install", "-q", "--no-input", "--progress-bar=off", "--no-compile", *what])


def run(command: list[str]) -> None:
    """Run a command without the caller's Python settings; its output is shown only when it fails.

    It inherits the lock: a pip that outlives a killed set-up still keeps the next one out."""
    unwanted = {"PYTHONPATH", "PYTHONHOME", "PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_REQUIRE_VIRTUALENV"}
    env = {key: value for key, value in os.environ.items() if key not in unwanted}
    env["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        pass_fds=lock_fds,
    )
    if done.returncode:
        tail = "\n".join(f"    {line[:300]}" for line in done.stdout.strip().splitlines()[-15:])
        raise SetupError(
            f"a command ended with exit status {done.returncode}; it said last\n{tail}",
            " ".join(command),
            "see above; most often the network or the disk (4 GB are needed). Then run again: what is there is kept",
        )


@contextlib.contextmanager
def lock() -> Iterator[None]:
    """One set-up at a time. The kernel drops the lock with the last process that holds it, so none goes stale."""
    with open(LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("set-up: another one is running; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        lock_fds.append(file.fileno())
        yield


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    started = time.monotonic()
    say(f"  {name} ...", end=" ")
    try:
        yield
    except BaseException:
        say("failed")
        raise
    say(f"{time.monotonic() - started:.0f} s")


def say(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)


def use_supported_python() -> None:
    """Go on under a supported Python outside .venv: this one, or the first on PATH that really runs."""
    if sys.prefix == str(VENV):  # started from the activated environment, which may be about to be replaced
        base = getattr(sys, "_base_executable", sys.executable)
        if base != sys.executable:
            os.execv(base, [base, *sys.argv])
    if sys.version_info[:2] in SUPPORTED:
        return
    for major, minor in SUPPORTED:
        for folder in os.get_exec_path():
            candidate = os.path.join(folder, f"python{major}.{minor}")
            if os.access(candidate, os.X_OK) and runs(candidate, f"{major}.{minor}"):
                os.execv(candidate, [candidate, *sys.argv])
    raise SetupError(
        f"Python 3.11 or 3.12 is needed, this is {sys.version.split()[0]}, and PATH has no other that runs",
        sys.executable,
        "install one (Debian: apt install python3.11 python3.11-venv), or name it: make PYTHON=/path/to/python3.11",
    )


def runs(candidate: str, version: str) -> bool:
    """pyenv's shims exist for versions that it then refuses to run."""
    code = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
    try:
        done = subprocess.run([candidate, "-c", code], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.stdout.strip() == version


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that the running pip is ended too
    try:
        use_supported_python()
        with lock():
            make_ready()
    except SetupError as error:
        say(str(error))
        return 2
    except OSError as error:
        fix = "check rights and disk space, then run again"
        say(str(SetupError(error.strerror or str(error), error.filename, fix)))
        return 2
    except KeyboardInterrupt:
        say("set-up: interrupted; run again to go on")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
