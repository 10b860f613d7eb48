"""Random damage (tests/fuzz.py): fixed seeds, of each kind what takes a few seconds, and seeds that found a fault."""

from __future__ import annotations

import shutil

import pytest

from tests import fuzz
from tests.faults.page import fault

FOUND = {  # on which the readers failed that had no types and limits
    "store": (46, 74, 88, 113),
    "draft": (27, 42, 43, 49, 62),
    "rows": (9, 47),
    "stream": (),
    "target": (
        1,
        2,
        10,
        11,
        12,
        14,
        15,
        16,
        17,
        18,
        19,
        20,
        23,
        25,
        27,
        30,
        31,
        34,
        35,
        36,
        38,
        40,
        42,
        47,
        50,
        53,
        55,
    ),
    "run": (30,),
    "settings": (0, 17, 93, 112),
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
