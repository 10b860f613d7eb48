"""`make proof`: the demo as a whole, offline and online, on this machine. Writes its figures to benchmarks/results."""

from __future__ import annotations

import datetime
import json
import os
import platform
from pathlib import Path

import pytest

from tests.e2e.test_commands import ROOT, command, run

pytestmark = [pytest.mark.proof, pytest.mark.timeout(5400)]


def demo(folder: Path, *flags: str) -> dict:
    (folder / "cache").mkdir(exist_ok=True)
    run(command("demo", "--output", folder / "demo", *flags), folder, timeout=2600)
    return json.loads((folder / "demo" / "summary.json").read_text())


@pytest.fixture(scope="module")
def summaries(tmp_path_factory) -> dict[str, dict]:
    offline, online = tmp_path_factory.mktemp("offline"), tmp_path_factory.mktemp("online")
    found = {"offline": demo(offline), "online": demo(online, "--online")}
    assert not list(online.rglob("shard-*")), "online training left features on disk"
    today = datetime.date.today().isoformat()
    found["machine"] = {
        "date": today,
        "cores": len(os.sched_getaffinity(0)),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
    }
    path = ROOT / "benchmarks" / "results" / f"demo_{len(os.sched_getaffinity(0))}-core-cpu_{today}.json"
    path.write_text(json.dumps(found, indent=2) + "\n")
    return found


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_the_demo_proves_its_acceptance(summaries, mode):
    summary = summaries[mode]
    assert summary["engine"] == "sglang"
    assert summary["acceptance_length_before"] < 1.1
    whole = summary["epochs"] == 5  # a slow machine trains less
    assert summary["acceptance_length_after"] >= (2.25 if whole else 1.75)
    assert summary["held_out_predictions"] >= 3000
    assert summary["greedy_lossless"] is True
    # decoding walks through the text that the target wrote: the two lengths measure the same thing on other prompts
    assert summary["decode_acceptance_length"] == pytest.approx(summary["walk_length_after"], rel=0.1)


def test_online_reaches_the_same_acceptance(summaries):
    one, two = (summaries[mode]["acceptance_length_after"] for mode in ("offline", "online"))
    assert two == pytest.approx(one, abs=0.05)
