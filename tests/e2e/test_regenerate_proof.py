"""`make proof`: regenerate with a real model in fp32, killed twice and unbroken. Figures go to benchmarks/results."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import sys
import time

import pytest

from tests import tiny
from tests.e2e.test_commands import ROOT, command, kill_when, run
from tests.e2e.test_regenerate import progress, rows, same

PROMPTS, LONGEST = 50, 48
AGAIN = {"role": "user", "content": "Say that again in fewer words."}


@pytest.mark.proof
@pytest.mark.timeout(1800)
def test_a_real_run_that_was_killed_twice_gives_the_same_file(tmp_path):
    run([sys.executable, "-m", "specforge.target.gguf", "target"], tmp_path)
    given = rows(ROOT / "examples" / "conversations.jsonl")[:PROMPTS]
    prompts = [{"id": row["id"], "conversations": [*row["conversations"], AGAIN]} for row in given]
    tiny.write_jsonl(tmp_path / "prompts.jsonl", prompts)
    fixed = "--model-path target --prompts prompts.jsonl --dtype float32 --max-new-tokens"
    regenerate = command("regenerate", *fixed.split(), LONGEST, "--output")
    began = time.monotonic()
    said = run([*regenerate, "unbroken.jsonl"], tmp_path)
    seconds = time.monotonic() - began

    killed, output = [*regenerate, "killed.jsonl"], tmp_path / "killed.jsonl"
    kill_when(killed, tmp_path, lambda: progress(output) >= 10)
    kept = progress(output)
    kill_when(killed, tmp_path, lambda: progress(output) >= kept + 10)
    kept = [kept, progress(output)]
    assert f"going on: {kept[1]} of {PROMPTS}" in run(killed, tmp_path)
    assert same(output, tmp_path / "unbroken.jsonl")

    conversations = rows(output)
    found = re.search(r"in (\d+) s  ([\d.,]+) answers/s, ([\d,]+) tokens/s", said)
    assert found
    result = {
        "date": datetime.date.today().isoformat(),
        "cores": len(os.sched_getaffinity(0)),
        "processor": platform.processor() or platform.machine(),
        "target": "SmolLM2-135M-Instruct, float32",
        "conversations": PROMPTS,
        "max_new_tokens": LONGEST,
        "kept": len(conversations),
        "whole": sum(len(row["conversations"]) == 4 for row in conversations),
        "seconds_with_start": round(seconds, 1),
        "seconds_answering": int(found.group(1)),
        "answers_per_second": float(found.group(2).replace(",", "")),
        "tokens_per_second": int(found.group(3).replace(",", "")),
        "killed_after_conversations": kept,
        "killed_twice_equals_unbroken": True,
    }
    name = f"regenerate_{result['cores']}-core-cpu_{result['date']}.json"
    (ROOT / "benchmarks" / "results" / name).write_text(json.dumps(result, indent=2) + "\n")
