"""The table of faults: what goes wrong, what the user sees, and the test that holds it.

    python -m tests.faults.page docs/faults.md        (make faults: after its tests have passed)

A test says it of itself: @fault("a bit flips in a checkpoint", "a warning that names the file; ...")."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLACES = ("tests/faults", "tests/unit", "tests/e2e")
HEAD = """# Faults, and what you see of them

Written by `make faults` from the tests that hold each row; do not edit it. "Refused" is one message that says what was
expected, what was found and how to fix it, with exit code 2 and no partial output.

| what goes wrong | what you see | test |
|---|---|---|
"""


def fault(what: str, sees: str) -> pytest.MarkDecorator:
    return pytest.mark.fault(what, sees)


def rows() -> list[tuple[str, str, str]]:
    """(fault, what the user sees, test), in the order of the files."""
    found = []
    for place in PLACES:
        for file in sorted((ROOT / place).glob("test_*.py")):
            if "@fault(" not in file.read_text(encoding="utf-8"):
                continue
            module = import_module(f"{place.replace('/', '.')}.{file.stem}")
            for name, value in vars(module).items():
                if not name.startswith("test_") or value.__module__ != module.__name__:
                    continue
                for mark in getattr(value, "pytestmark", ()):
                    if mark.name == "fault":
                        found.append((*mark.args, f"{file.relative_to(ROOT)}::{name}"))
    return found


def page() -> str:
    return HEAD + "".join(f"| {what} | {sees} | `{test.replace('::', '`<br>`')}` |\n" for what, sees, test in rows())


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
    print(f"{sys.argv[1]}: {len(rows())} faults")
