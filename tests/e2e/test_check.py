"""`specforge check` as a user runs it: a draft trained on real features of a tiny target passes, SGLang's own class
gives its logits, and a well-formed draft whose layer ids are shifted alike for both servers is found by
the layers that it understands better."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from specforge.config import DataSettings
from specforge.data import prepared
from specforge.data.tokenize import ChatTokenizer
from specforge.draft import folder as draft_folder
from specforge.draft.model import DraftConfig, Eagle3Draft
from specforge.draft.step import DraftStep
from specforge.records import FeatureBatch, Ranks
from specforge.target import weights
from specforge.target.hf_engine import HfEngine
from tests import tiny
from tests.e2e.test_commands import command, run

LAYERS, STEPS = (1, 3, 4), 3
SEEN = re.compile(
    r"class and ours on ([\d,]+) positions: largest logit difference (\S+), (\S+) of the logits' norm .*?"
    r"same first choice at ([\d.]+)%, (\d+) differ beyond"
)
LENGTH = re.compile(r"([\d.]+) tokens a pass over ([\d,]+) predictions, 3 steps")


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A target that answers in words, conversations, and a draft trained for a few steps on its states."""
    folder = tmp_path_factory.mktemp("work")
    tiny.make_talker(folder / "target")
    tiny.write_jsonl(folder / "rows.jsonl", tiny.conversations(120))
    info, tokenizer = weights.describe(str(folder / "target")), ChatTokenizer(str(folder / "target"))
    engine = HfEngine(info, LAYERS, Ranks(), dtype=torch.float32, tokens_per_batch=2048)
    examples = prepared.load_examples(folder / "rows.jsonl", tokenizer, DataSettings(max_length=256))
    records = engine.capture(examples[:40])  # those that `check` reads: learnt by heart in a few steps
    kept = torch.tensor(sorted({int(token) for record in records for token in record.teacher_top1} | {0, 1, 2}))
    draft = Eagle3Draft(DraftConfig.for_target(info, LAYERS, len(kept)))
    head = weights.load_head(info, torch.float32)
    draft.initialise(head, kept, seed=0)
    step = DraftStep(draft, head, kept, STEPS, 0.8)
    optimizer = torch.optim.Adam(draft.parameters(), lr=3e-3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices this small are slower on several
    for at in range(100):
        batch = FeatureBatch.pack(records[at * 10 % 40 :][:10], torch.device("cpu"), torch.float32)
        result = step(batch, step.loss_rows(batch))
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
    torch.set_num_threads(threads)
    draft_folder.save(folder / "draft", draft, kept, draft.state_dict(), torch.float32)
    return folder


def check(work: Path, draft: str, *more: object, code: int) -> str:
    given = ["--model-path", "target", "--data", "rows.jsonl", "--tokens-per-batch", 2048, *more]
    return " ".join(run(command("check", draft, *given), work, code=code).replace("│", " ").split())


def test_a_trained_draft_passes_and_sglangs_class_gives_its_logits(work):
    said = check(work, "draft", code=0)
    seen = SEEN.search(said)
    assert seen, said
    assert int(seen[1].replace(",", "")) >= 1000
    assert float(seen[2]) < 1e-3  # fp32: sums in another order
    assert float(seen[3]) < 1e-5
    assert float(seen[4]) == 100
    assert int(seen[5]) == 0
    length = LENGTH.search(said)
    assert length, said
    assert float(length[1]) > 1.3
    assert "python -m sglang.launch_server" in said


def test_ids_shifted_alike_for_both_servers_are_found(work):
    shutil.copytree(work / "draft", work / "shifted")
    file = work / "shifted" / "config.json"
    raw = json.loads(file.read_text())
    raw["eagle_aux_hidden_state_layer_ids"] = [3, 5, 6]
    raw["eagle_config"]["eagle_aux_hidden_state_layer_ids"] = [2, 4, 5]
    file.write_text(json.dumps(raw))
    said = check(work, "shifted", "--engine", "hf", code=2)
    assert "understands layers [1, 3, 4] better than [2, 4, 5]" in said
    assert "1 fault(s)" in said  # well-formed in all else
