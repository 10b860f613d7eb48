"""The benchmark: whose domains the samples of a store are given, what is shown, and which trees have room."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from specforge import console
from specforge.config import BenchmarkSettings
from specforge.errors import ConfigError
from specforge.evaluate.figures import figures
from specforge.evaluate.shape import Shape
from specforge.pipeline.decoding import check_room, shape_of
from specforge.pipeline.proof import _domains, _show
from specforge.records import Acceptance, Example

TOKENS = {number: np.arange(number, number + 5, dtype=np.int32) for number in (3, 7, 8)}


def example(number, domain="", ids=None):
    ids = TOKENS[number] if ids is None else ids
    return Example(sample_id=number, token_ids=ids, loss_mask=np.ones(len(ids), dtype=bool), domain=domain)


def test_samples_of_a_store_have_the_domains_of_the_data_that_it_was_made_from(capsys):
    other = np.zeros(5, dtype=np.int32)
    given = [example(3, "code"), example(5, "chat", other), example(7), example(8, "chat")]
    assert _domains(given, TOKENS) == {3: "code", 8: "chat"}
    assert _domains([], TOKENS) == {}
    assert "note" not in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["missing", "other tokens", "longer"])
def test_data_that_the_store_was_not_made_from_name_nothing_and_that_is_said(capsys, wrong):
    ids = {"other tokens": TOKENS[7] + 1, "longer": np.append(TOKENS[7], 9).astype(np.int32)}
    given = [example(3, "code"), example(8, "chat")]
    if wrong != "missing":
        given.append(example(7, "chat", ids[wrong]))
    assert _domains(given, TOKENS) == {}
    assert "the store was not made from --data" in capsys.readouterr().out


@pytest.mark.parametrize("domains", [{}, {0: "code", 1: "[red]chat[/"}])
def test_the_figures_are_shown_with_intervals(capsys, monkeypatch, domains):
    monkeypatch.setattr(console.console, "width", 100)
    found = Acceptance(
        sample_ids_N=np.arange(2),
        rows_NK=np.array([[30, 20], [10, 10]]),
        accepted_NK=np.array([[15, 5], [10, 5]]),
        walk_N2=np.array([[30, 20], [10, 5]]),
        known_N=np.array([25, 10]),
        bins_3B=np.pad([[20.0], [25.0], [40.0]], ((0, 0), (5, 4))),
    )
    _show(figures(found, domains))
    said = capsys.readouterr().out
    assert "acceptance length 1.958 (1.75 .. 2.50), walk 1.600 (1.50 .. 2.00), over 40 held-out predictions" in said
    assert "1: 1.62, 2: 1.96" in said
    assert "holds 87.5% of the target's choices; calibration error 0.125" in said
    assert ("[red]chat[/" in said) == bool(domains)


def settings(**given):
    return BenchmarkSettings(model_path="target", draft="draft", **given)


def test_the_shape_is_what_was_asked_for():
    assert shape_of(settings(), 100) == Shape.chain(7)
    assert shape_of(settings(steps=3), 100) == Shape.chain(3)
    assert shape_of(settings(steps=5, top_k=4), 100) == Shape(steps=5, top_k=4, draft_tokens=16)
    assert shape_of(settings(steps=5, top_k=4, draft_tokens=9), 100) == Shape(steps=5, top_k=4, draft_tokens=9)


@pytest.mark.parametrize(
    ("given", "what"),
    [({"top_k": 100, "steps": 7}, "399 paths"), ({"sweep": True, "top_k": 4}, "chooses these itself")],
)
def test_shapes_that_cannot_be_are_refused(given, what):
    with pytest.raises(ConfigError, match=what):
        shape_of(settings(**given), 1000)


@pytest.mark.parametrize(("room", "batch_size", "fits"), [(2 * 39, 2, True), (2 * 39 - 1, 2, False), (39, 1, True)])
def test_prompts_at_once_must_have_room_whatever_the_draft_says(room, batch_size, fits):
    """10 tokens, 20 new ones, and for a tree of 5 at most 9: 3 paths of 3 tokens that share two."""
    engine = SimpleNamespace(tokens_per_batch=room, info=SimpleNamespace(config={"max_position_embeddings": 33}))
    given = settings(max_new_tokens=20, batch_size=batch_size)
    shapes = [Shape.chain(2), Shape(steps=3, top_k=4, draft_tokens=5)]
    assert shapes[1].most_tokens == 9
    if fits:
        check_room(given, engine, [[1] * 10, [1] * 3], shapes)
    else:
        with pytest.raises(ConfigError, match="room"):
            check_room(given, engine, [[1] * 10, [1] * 3], shapes)


def test_drafts_may_not_reach_beyond_the_context():
    engine = SimpleNamespace(tokens_per_batch=1000, info=SimpleNamespace(config={"max_position_embeddings": 32}))
    with pytest.raises(ConfigError, match="context of 32"):
        check_room(settings(max_new_tokens=20), engine, [[1] * 10], [Shape.chain(3)])
