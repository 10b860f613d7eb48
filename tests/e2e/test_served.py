"""benchmark through real SGLang servers on a CPU: a plain one that the command starts itself, one that cannot start,
and one that drafts with EAGLE-3 (SGLang's Triton kernels in Triton's interpreter: sglang_server.py)."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests import tiny
from tests.e2e.servers import ON_A_CPU, free_port, server
from tests.e2e.test_commands import FP32, ROOT, command, run
from tests.faults.test_bad_input import make_draft


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A target and questions for it. Python started here can import SGLang as a program: specforge comes first."""
    folder = tmp_path_factory.mktemp("served")
    tiny.make_talker(folder / "target")
    asked = [{"prompt": f"{row['conversations'][0]['content']}", "domain": "ab"[at % 2]} for at, row in ROWS]
    tiny.write_jsonl(folder / "questions.jsonl", asked)
    (folder / "sitecustomize.py").write_text("import specforge")
    return folder


ROWS = list(enumerate(tiny.conversations(12, seed=5)))


def benchmark(*arguments: object) -> list[str]:
    fixed = "--questions questions.jsonl --num-prompts 12 --max-new-tokens 24"
    return command("benchmark", *fixed.split(), *arguments)


def launching(folder: Path, *arguments: object, code: int = 0) -> tuple[str, list[int]]:
    """(what was said, process groups that are still there)."""
    environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "COLUMNS": "200"}
    flags = f"{ON_A_CPU} --attention-backend torch_native"
    process = subprocess.Popen(
        benchmark("--launch", "--model-path", "target", "--dtype", "float32", "--launch-args", flags, *arguments),
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    said, _ = process.communicate(timeout=300)
    assert process.returncode == code, said
    return said, sglang_processes(folder)


def sglang_processes(folder: Path) -> list[int]:
    """Processes that run in `folder`."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if (place / "cwd").resolve() == folder.resolve() and "sglang" in (place / "cmdline").read_text():
                found.append(int(place.name))
        except OSError:
            continue
    return found


def test_a_plain_server_is_started_measured_and_ended(work):
    said, left = launching(work, "--concurrency", "1 4", "--output", "plain.json")
    assert not left
    assert "$ python -m sglang.launch_server --model-path target --dtype float32" in said
    assert said.count("warning") == 1
    assert "not reported" in said
    served = json.loads((work / "plain.json").read_text())["served"]
    assert served["kind"] == "sglang"
    assert served["acceptance_length"] is None
    one, four = served["levels"]
    assert (one["failed"], four["failed"]) == (0, 0)
    assert one["tokens"] == four["tokens"]  # greedy, the same questions
    for level in (one, four):
        assert level["requests"] == 12
        assert level["tokens_per_second"] == pytest.approx(level["tokens"] / level["seconds"])
        for times in (level["first_token"], level["per_token"]):
            assert 0 < times["p50"] <= times["p90"] <= times["p99"] < level["seconds"]


@pytest.mark.proof  # a stub that dies is tested in faults/
def test_a_server_that_cannot_start_says_why(work):
    """EAGLE-3 with torch's attention: SGLang refuses it once the target is loaded."""
    make_draft(work / "untrained", work / "target")
    said, left = launching(work, "--draft", "untrained", "--steps", 3, "--output", "none.json", code=2)
    assert not left
    assert said.count("where:") == said.count("fix:") == 1
    assert "the server ended while it started" in said
    assert "EAGLE is not supported in decode attention backend torch_native" in said
    assert not (work / "none.json").exists()


def make_trained_draft(folder: Path) -> None:
    """folder/draft/best, trained on what the target writes itself."""
    (folder / "ds.json").write_text(json.dumps(FP32))
    tiny.write_jsonl(folder / "prompts.jsonl", tiny.conversations(150, turns=1))
    target = ["--model-path", "target"]
    run(command("regenerate", *target, "--prompts", "prompts.jsonl", "--output", "rows.jsonl"), folder)
    run(command("prepare-data", *target, "--dataset", "rows.jsonl", "--output", "data", "--test-share", 0.2), folder)
    given = "--online --data data --output draft --deepspeed-config ds.json --draft-vocab-size 512 --epochs 8 --steps 3"
    sizes = "--row-tokens 256 --batch-size 1 --max-length 256 --lr 3e-3 --tracker none"
    run(command("train", *target, *given.split(), *sizes.split()), folder)


@pytest.mark.proof
@pytest.mark.timeout(1800)
def test_eagle3_in_sglang_accepts_what_real_decoding_accepts(work):
    """The same greedy questions, in fp32: token for token the same drafts stand, whoever drafts."""
    make_trained_draft(work)
    port = free_port()
    draft = "--speculative-algorithm EAGLE3 --speculative-draft-model-path draft/best --speculative-num-steps 3"
    chain = "--speculative-eagle-topk 1 --speculative-num-draft-tokens 4 --attention-backend triton"
    with server(work, port, *draft.split(), *chain.split(), TRITON_INTERPRET="1", TORCHDYNAMO_DISABLE="1"):
        asking = ["--server", f"http://127.0.0.1:{port}", "--concurrency", 2, "--num-prompts", 8, "--steps", 3]
        both = ["--model-path", "target", "--draft", "draft/best", "--data", "data", "--max-length", 256]
        said = run(benchmark(*asking, *both, "--output", "both.json"), work, timeout=1500)
    result = json.loads((work / "both.json").read_text())
    served, decoded = result["served"], result["decode"]
    assert served["speculative"] == {"algorithm": "EAGLE3", "steps": 3, "topk": 1, "draft_tokens": 4}
    assert served["acceptance_source"] == "requests"
    assert decoded["greedy_lossless"] is True
    assert decoded["acceptance_length"] > 1.1  # else equal lengths would prove little
    assert served["acceptance_length"] == pytest.approx(decoded["acceptance_length"], abs=1e-9)
    for name, part in decoded["by_domain"].items():
        assert served["by_domain"][name]["acceptance_length"] == pytest.approx(part["acceptance_length"], abs=1e-9)
    assert set(result["kinds"]) == {"teacher-forced walk", "decoding in process", "through the server"}
    assert all(result["kinds"].values())
    assert not [pair for pair in result["disagreements"] if "teacher-forced walk" not in pair[:2]]
    assert "side by side" in said
