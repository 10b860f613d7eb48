"""What `auto` chooses: as the sweep says, for every size of data and number of ranks, and the same when resumed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specforge.config import TrainSettings
from specforge.train.recipe import FEWEST, MOST, UPDATES, choose


def chosen(tokens=73_227, hidden_size=576, world=1, before=None, **given):
    return choose(TrainSettings(**{"epochs": 4, **given}), tokens, hidden_size, world, before)


def test_the_demo_gets_what_the_sweep_found_best():
    recipe, reasons = chosen()
    assert recipe.row_tokens * recipe.batch_size == 73_227 * 4 // UPDATES
    assert recipe.lr == pytest.approx(9.2e-3)
    assert recipe.adam_lr == 2e-3
    said = " ".join(reasons)
    for flag in ("--row-tokens", "--batch-size", "--lr", "--adam-lr", "--warmup-share"):
        assert flag in said


@given(st.integers(100, 10**11), st.integers(64, 16384), st.sampled_from([1, 2, 3, 8, 64]), st.integers(1, 40))
def test_every_run_gets_settings_that_training_takes(tokens, hidden_size, world, epochs):
    recipe, _ = chosen(tokens, hidden_size, world, epochs=epochs)
    assert recipe.batch_size % world == 0
    a_step = recipe.row_tokens * recipe.batch_size
    assert min(FEWEST, MOST) <= a_step
    assert a_step <= 1.5 * MOST + recipe.row_tokens * world
    assert 0 < recipe.adam_lr <= recipe.lr <= 0.2
    assert 0.03 <= recipe.warmup_share <= 0.5
    again = TrainSettings(  # what was chosen can be given by hand
        row_tokens=recipe.row_tokens, batch_size=recipe.batch_size, lr=recipe.lr, warmup_share=recipe.warmup_share
    )
    assert (again.lr, again.batch_size) == (recipe.lr, recipe.batch_size)


def test_more_steps_and_wider_targets_get_lower_rates():
    rates = [chosen(tokens, epochs=1)[0].lr for tokens in (20_000, 150_000, 10**7, 10**8)]
    assert rates == sorted(rates, reverse=True)
    assert chosen(hidden_size=4096)[0].lr == pytest.approx(chosen()[0].lr * 576 / 4096, rel=0.02)


def test_adamw_has_one_rate_and_it_is_lower():
    recipe, reasons = chosen(optimizer="adamw")
    assert recipe.lr == recipe.adam_lr < chosen()[0].lr
    assert "--adam-lr" not in " ".join(reasons)


def test_what_is_given_stays_and_is_not_explained():
    recipe, reasons = chosen(lr=1e-4, batch_size=3, row_tokens=100, adam_lr=1e-5, warmup_share=0.0)
    assert (recipe.lr, recipe.batch_size, recipe.row_tokens) == (1e-4, 3, 100)
    assert (recipe.adam_lr, recipe.warmup_share) == (1e-5, 0.0)
    assert reasons == []


def test_a_resumed_run_keeps_its_choices_with_other_ranks():
    first, _ = chosen(tokens=10**7, world=1)
    second, reasons = chosen(tokens=10**7, world=4, before=first.as_json())
    assert second == first
    assert reasons == ["auto: as the run that is resumed"]
    assert chosen(tokens=10**7, before=first.as_json(), lr=1e-5)[0].lr == 1e-5  # refused later, by its name
