"""regenerate on a tiny fp32 target in real SGLang: embedded with one rank and two, and as a server of its own.

Equal means byte for byte. Other batches round the logits otherwise (about 1e-6 of them), which changes a token only at
a near-tie; this target's choices are far from ties."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import tiny
from tests.e2e.servers import free_port, server
from tests.e2e.test_commands import ROOT, command, kill_when, run

LONGEST = 32


def regenerate(output: str, *arguments: object) -> list[str]:
    fixed = ["--prompts", "prompts.jsonl", "--output", output, "--max-new-tokens", LONGEST]
    return command("regenerate", *fixed, *arguments)


def embedded(output: str, *arguments: object) -> list[str]:
    return regenerate(output, "--model-path", "target", *arguments)


def progress(path: Path) -> int:
    """Conversations in the progress file of an unfinished run."""
    file = path.with_name(path.name + ".progress.jsonl")
    return file.read_bytes().count(b"\n") - 1 if file.exists() else 0


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def same(one: Path, two: Path) -> bool:
    """Both files of each run."""
    pairs = [(path, path.with_name(path.name + ".failed.jsonl")) for path in (one, two)]
    return all(a.read_bytes() == b.read_bytes() for a, b in zip(*pairs, strict=True))


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("regenerate")
    tiny.make_talker(folder / "target")
    given = tiny.conversations(40, turns=3)
    given[0]["conversations"].insert(0, {"role": "system", "content": "yes and no."})
    given[1]["conversations"].insert(3, {"role": "tool", "content": "7"})
    given[2]["conversations"][0]["content"] = "the cat " * 600  # 1,200 tokens: more than the target's context
    tiny.write_jsonl(folder / "prompts.jsonl", given)
    said = run(embedded("unbroken.jsonl", "--tokens-per-batch", 300), folder)
    assert "next: specforge prepare-data --dataset unbroken.jsonl" in said
    return folder


def test_every_answer_is_the_targets_own_to_its_own_history(work):
    """All kept conversations, turn by turn, against greedy decoding in transformers."""
    model = AutoModelForCausalLM.from_pretrained(work / "target", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(work / "target")
    found = {row["id"]: row["conversations"] for row in rows(work / "unbroken.jsonl")}
    given = {row["id"]: row["conversations"] for row in rows(work / "prompts.jsonl")}
    turns = 0
    for conversation in found.values():
        for at, message in enumerate(conversation):
            if message["role"] != "assistant":
                continue
            text = tokenizer.apply_chat_template(conversation[:at], tokenize=False, add_generation_prompt=True)
            prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt")
            new = model.generate(**prompt, max_new_tokens=LONGEST, do_sample=False)[0, prompt["input_ids"].shape[1] :]
            assert tokenizer.decode(new) == message["content"] + "<|im_end|>"
            turns += at > 1
    assert turns >= 15  # answers to a history
    for name in found:
        asked = [message for message in given[name] if message["role"] not in ("assistant", "tool")]
        kept = [message for message in found[name] if message["role"] != "assistant"]
        assert kept == asked[: len(kept)]


def test_what_was_not_answered_is_recorded(work):
    asked, kept, failed = (
        {row["id"]: row for row in rows(work / name)}
        for name in ("prompts.jsonl", "unbroken.jsonl", "unbroken.jsonl.failed.jsonl")
    )
    for found in (kept, failed):
        assert list(found) == [name for name in asked if name in found]  # the order of the prompts
    for name in asked:
        turns = sum(message["role"] == "user" for message in kept.get(name, {"conversations": []})["conversations"])
        assert turns == (failed[name]["turn"] - 1 if name in failed else 3)
    assert "used tools" in failed["row-1"]["reason"]
    assert "too long" in failed["row-2"]["reason"]
    special = [row for row in failed.values() if "<|endoftext|>" in row["reason"]]
    truncated = [row for row in failed.values() if row["kind"] == "truncated"]
    assert special
    assert truncated
    assert all("<|endoftext|>" in row["produced"] for row in special)
    assert all(len(row["produced"].replace("<|endoftext|>", " x").split()) == LONGEST for row in truncated)


OPENS_A_THOUGHT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content.split('</think>')[-1] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)


def test_every_finished_answer_of_a_target_whose_prompt_opens_a_thought_is_prepared(tmp_path):
    """The template drops thoughts from the history and the answer closes none that stands in it: no way through text.
    The tokens that the target was fed and wrote are kept, so all of it can be learned from."""
    tiny.make_talker(tmp_path / "target")
    (tmp_path / "target" / "chat_template.jinja").write_text(OPENS_A_THOUGHT)
    tiny.write_jsonl(tmp_path / "prompts.jsonl", tiny.conversations(40, turns=2))
    run(embedded("answers.jsonl"), tmp_path)
    answered = {row["id"]: row for row in rows(tmp_path / "answers.jsonl")}
    assert len(answered) > 20
    prepare = (
        "prepare-data --dataset answers.jsonl --model-path target --output data --min-exchanges 1 --test-share 0.2"
    )
    run(command(*prepare.split()), tmp_path)
    report = json.loads((tmp_path / "data" / "report.json").read_text())
    gone = {"exact duplicate", "near-duplicate of a held-out conversation"}
    assert set(report["dropped"]) <= gone
    assert report["kept"] == len(answered) - sum(report["dropped"].values())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "target")
    learned = dict[str, list[str]]()
    for side in ("train", "test"):
        for row in rows(tmp_path / "data" / f"{side}.jsonl"):
            ids, mask = np.array(row["input_ids"]), np.array(row["loss_mask"])
            edges = np.flatnonzero(np.diff(mask, prepend=0, append=0))
            for first, last in zip(edges[::2], edges[1::2], strict=True):
                assert tokenizer.decode(ids[:first]).endswith("<|im_start|>assistant\n<think>\n")
                learned.setdefault(row["id"].split("#")[0], []).append(tokenizer.decode(ids[first:last]))
    for name, texts in learned.items():
        turns = [turn["content"] for turn in answered[name]["conversations"] if turn["role"] == "assistant"]
        assert texts == [text + "<|im_end|>" for text in turns]


@pytest.mark.proof
def test_a_run_that_was_killed_twice_gives_the_same_file(work):
    output = work / "killed.jsonl"
    first = embedded("killed.jsonl", "--concurrency", 4)
    kill_when(first, work, lambda: progress(output) >= 4)
    kept = progress(output)
    kill_when(first, work, lambda: progress(output) >= kept + 6)
    assert not output.exists()
    assert "going on" in run(embedded("killed.jsonl"), work)
    assert same(output, work / "unbroken.jsonl")
    assert not list(work.glob("*progress*"))


@pytest.mark.proof
def test_two_ranks_give_the_same_file(work):
    run(embedded("tp2.jsonl", "--tp-size", 2), work)
    assert same(work / "tp2.jsonl", work / "unbroken.jsonl")


DRAW = ["--temperature", 0.8, "--top-p", 0.9]


@pytest.fixture(scope="module")
def drawn(work) -> Path:
    run(embedded("drawn.jsonl", *DRAW, "--seed", 3), work)
    return work / "drawn.jsonl"


@pytest.mark.proof
def test_draws_repeat_for_a_seed_whatever_runs_beside_them(work, drawn):
    again = embedded("again.jsonl", *DRAW, "--seed", 3, "--concurrency", 3)
    kill_when(again, work, lambda: progress(work / "again.jsonl") >= 5)
    run(again, work)
    assert same(work / "again.jsonl", drawn)


@pytest.mark.proof
def test_two_ranks_draw_the_same(work, drawn):
    run(embedded("drawn2.jsonl", *DRAW, "--seed", 3, "--tp-size", 2), work)
    assert same(work / "drawn2.jsonl", drawn)


@pytest.mark.proof
def test_another_seed_draws_something_else(work, drawn):
    run(embedded("other.jsonl", *DRAW, "--seed", 4), work)
    assert (work / "other.jsonl").read_bytes() != drawn.read_bytes()


@pytest.mark.proof
def test_a_server_that_is_killed_and_started_again_gives_the_file_of_the_embedded_engine(work):
    port = free_port()
    asking = regenerate("served.jsonl", "--server", f"http://127.0.0.1:{port}", "--concurrency", 4)
    with server(work, port) as process:
        client = subprocess.Popen(
            asking,
            cwd=work,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        while progress(work / "served.jsonl") < 5:
            assert client.poll() is None
            time.sleep(0.001)
        os.killpg(process.pid, signal.SIGKILL)
    said, _ = client.communicate(timeout=60)
    assert client.returncode == 2, said
    assert "the same command goes on" in said
    assert progress(work / "served.jsonl") >= 5
    with server(work, port):
        assert "going on" in run(asking, work)
    assert (work / "served.jsonl").read_bytes() == (work / "unbroken.jsonl").read_bytes()
    one, two = (rows(work / f"{name}.jsonl.failed.jsonl") for name in ("served", "unbroken"))
    assert [row for row in one if row["id"] != "row-2"] == [row for row in two if row["id"] != "row-2"]
    assert "HTTP 400" in next(row["reason"] for row in one if row["id"] == "row-2")  # the server's own words
