"""Decoding with the transformers engine, whose sessions go path by path: the loop, and where a text ends. SGLang, and
drafts good and bad: tests/parity/test_trees.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from specforge.draft.model import DraftConfig, Eagle3Draft
from specforge.evaluate.decode import Limits, Text, plain, speculative
from specforge.evaluate.drafter import Drafting
from specforge.evaluate.replay import SHAPES, sweep, walk
from specforge.evaluate.rules import Drawn
from specforge.evaluate.shape import Shape
from specforge.records import Ranks
from specforge.target import weights
from specforge.target.hf_engine import HfEngine
from tests import tiny

CHAIN, TREE = Shape.chain(2), Shape(steps=2, top_k=20, draft_tokens=40)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(engine, drafting, prompts, limits). The draft can say the target's words and no other tokens, so it has hits."""
    folder = tiny.make_talker(tmp_path_factory.mktemp("target") / "t")
    info, own = weights.describe(str(folder)), tiny.tokenizer()
    engine = HfEngine(info, (1, 3, 4), Ranks(), dtype=torch.float32, tokens_per_batch=512)
    head = weights.load_head(info, torch.float32)
    kept_D = torch.nonzero(head.head_VH.abs().sum(1)).flatten()
    draft = Eagle3Draft(DraftConfig.for_target(info, (1, 3, 4), len(kept_D))).eval()
    draft.initialise(head, kept_D, seed=0)
    drafting = Drafting(draft=draft, embedding_VH=head.embedding_VH, kept_D=kept_D, shape=CHAIN)
    prompts = [own.encode(f"<|im_start|>user\n{word}<|im_end|>\n<|im_start|>assistant\n") for word in tiny.WORDS[:5]]
    return engine, drafting, prompts, Limits(max_new_tokens=9, stop_ids=[own.eos_token_id])


def tokens(found):
    return [text.tokens for text in found.texts]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("shape", [CHAIN, TREE], ids=str)
def test_texts_are_those_of_plain_decoding_and_a_replay_is_the_decoding(made, shape, batch_size):
    engine, drafting, prompts, limits = made
    own = plain(engine, prompts, limits, record=True)
    assert len({len(text.tokens) for text in own.texts}) > 1  # so that prompts take the places of others
    drafting, limits = replace(drafting, shape=shape), replace(limits, batch_size=batch_size)
    fast = speculative(engine, drafting, prompts, limits)
    assert tokens(fast) == tokens(own) == tokens(plain(engine, prompts, limits))
    walked, trees = walk(drafting, own.texts, limits)
    assert [text.passes for text in walked.texts] == [text.passes for text in fast.texts]
    assert (walked.length, walked.rounds, len(trees)) == (fast.length, fast.rounds, fast.passes)
    assert fast.length > 1 or shape == CHAIN  # of a random draft
    assert own.length == 1
    for text in own.texts:
        assert len(text.near_ties) == len(text.tokens)
        assert len(torch.cat(text.aux)) == len(text.prompt) + len(text.tokens) - 1


@pytest.mark.parametrize("shape", [CHAIN, TREE], ids=str)
def test_what_a_prompt_draws_does_not_depend_on_its_company(made, shape):
    engine, drafting, prompts, limits = made
    drafting, rule = replace(drafting, shape=shape), Drawn(1.0, 3)
    one, three = (speculative(engine, drafting, prompts, replace(limits, batch_size=n), rule) for n in (1, 3))
    assert tokens(one) == tokens(three)
    assert tokens(one) != tokens(speculative(engine, drafting, prompts, limits, Drawn(1.0, 4)))


def test_paths_of_a_session_are_continuations_of_what_is_kept(made):
    """fp32, another number of rows in each product: 3e-6 of the largest value on CPUs with AVX-512 and with AVX2. A
    path that sees one token more or less of what is kept is 0.3 of it apart."""
    engine, _, prompts, _ = made
    session = engine.session()
    session.extend({5: [prompts[0]]}, only_last=True)
    session.keep(5, 0, len(prompts[0]))
    session.extend({5: [[7, 8, 9], [7, 11]], 2: [prompts[1]]})
    session.keep(5, 0, 2)
    session.drop(2)
    states = session.extend({5: [[20, 21], [30]]})[5]
    for path, (logits_nV, aux_nA) in zip(([20, 21], [30]), states, strict=True):
        ((want_TV, want_TA),) = engine.session().extend({0: [[*prompts[0], 7, 8, *path]]})[0]
        for got_nD, want_nD in ((logits_nV, want_TV[-len(path) :]), (aux_nA, want_TA[-len(path) :])):
            torch.testing.assert_close(got_nD, want_nD, rtol=0, atol=1e-5 * float(want_nD.abs().max()))


def test_a_text_ends_behind_its_stop_token_or_at_its_length():
    limits, text = Limits(max_new_tokens=5, stop_ids=[9]), Text(prompt=[1], tokens=[2, 3])
    assert limits.cut(text, [4, 5]) == [4, 5]
    assert limits.cut(text, [4, 5, 6, 7]) == [4, 5, 6]
    assert limits.cut(text, [4, 9, 6]) == [4, 9]
    assert not limits.ended(text)
    assert limits.ended(Text(prompt=[1], tokens=[2, 9]))
    assert limits.ended(Text(prompt=[1], tokens=[2, 3, 4, 5, 6]))


def test_the_expected_speed_up_is_length_over_cost(made):
    engine, drafting, prompts, limits = made
    own = plain(engine, prompts[:2], limits, record=True)
    rows = sweep(engine, drafting, own.texts, limits, SHAPES[:2])
    assert [row.shape for row in rows] == list(SHAPES[:2])
    for row in rows:
        assert row.length == walk(replace(drafting, shape=row.shape), own.texts, limits)[0].length
        cost = row.draft_seconds + row.target_seconds
        assert row.speed_up == pytest.approx(row.length * row.plain_seconds / cost)
        assert row.tokens_per_second == pytest.approx(row.length / cost)
