"""Random damage (tests/fuzz.py): fixed seeds, of each kind what takes a few seconds, and each seed that ever found a
fault."""

from __future__ import annotations

import shutil

import pytest

from tests import fuzz
from tests.faults.page import fault

FOUND = {  # seeds that found a fault once
    "store": (690,),
    "draft": (42, 43, 62, 81, 119, 157, 163, 209, 267, 304, 315, 321, 329, 370, 392, 402, 430, 590, 615, 771, 848),
    "rows": (9018,),
    "target": (25, 27, 31, 36, 71, 89, 94, 156, 161, 162, 5020),
    "run": (30, 121, 138, 179, 199, 201, 223),
    "settings": (0,),
    "stream": (),
}
SEEDS = {"store": 100, "draft": 80, "rows": 40, "stream": 12, "target": 60, "run": 60, "settings": 100}


@pytest.mark.parametrize("kind", fuzz.KINDS)
@fault(
    "random damage in stores, drafts, rows, streams, targets, runs, settings",
    "it works, or is refused, within five seconds; nothing is written outside of the output",
)
def test_what_is_damaged_by_chance_is_refused_or_works(kind, tmp_path, monkeypatch):
    """Seed -1 is the control: whole input, of which nothing may be refused."""
    monkeypatch.setattr(fuzz.regenerate_server, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(fuzz.endpoint, "MOST_BODY", 1 << 20)
    faults = {}
    for seed in dict.fromkeys((-1, *FOUND[kind], *range(SEEDS[kind]))):
        fault = fuzz.tried(kind, seed, tmp_path / f"case{seed}")
        shutil.rmtree(tmp_path / f"case{seed}")
        if fault:
            faults[seed] = fault
    assert not faults


def test_a_reader_without_limits_is_found_out(tmp_path, monkeypatch):
    """The harness sees an exception that no user can mend, and a file that is written elsewhere."""
    monkeypatch.setitem(fuzz.KINDS, "broken", lambda source, case: [lambda: {}["a"]])
    assert "KeyError" in fuzz.tried("broken", 0, tmp_path / "one")
    monkeypatch.setitem(fuzz.KINDS, "leaking", lambda source, case: [lambda: (case / "beside").write_text("x")])
    assert "written outside" in fuzz.tried("leaking", 0, tmp_path / "two")
    monkeypatch.setattr(fuzz, "SECONDS", -1.0)
    monkeypatch.setitem(fuzz.KINDS, "slow", lambda source, case: [])
    assert "took" in fuzz.tried("slow", 0, tmp_path / "three")
