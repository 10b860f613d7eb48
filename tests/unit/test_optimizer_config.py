"""ds_config.json and the run's settings become one DeepSpeed config, or a refusal; and the learning rate's shape."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specforge.config import TrainSettings
from specforge.errors import ConfigError
from specforge.records import Ranks
from specforge.train.optimizer import deepspeed_config, share_of_peak
from specforge.train.recipe import choose

OWN = Path(__file__).parents[2] / "ds_config.json"


@pytest.fixture
def with_config(tmp_path):
    """The result for the project's own ds_config.json with some keys replaced (dots go inside; None removes)."""

    def make(changes=None, world=1, training=torch.bfloat16, **given):
        raw = json.loads(OWN.read_text())
        for place, value in (changes or {}).items():
            inner = raw
            *path, last = place.split(".")
            for key in path:
                inner = inner.setdefault(key, {})
            if value is None:
                inner.pop(last, None)
            else:
                inner[last] = value
        path = tmp_path / "ds.json"
        path.write_text(json.dumps(raw))
        return filled(path, world, training, **given)

    return make


def filled(path, world=1, training=torch.bfloat16, **given):
    settings = TrainSettings(deepspeed_config=path, **{"batch_size": world, **given})
    recipe, _ = choose(settings, tokens=100_000, hidden_size=576, world=world)
    return deepspeed_config(settings, recipe, Ranks(world=world), training)


def refused(with_config, changes=None, **given):
    with pytest.raises(ConfigError) as error:
        with_config(changes, **given)
    return error.value


def words_auto(value):
    """Where "auto" is left."""
    if isinstance(value, dict):
        return [f"{key}.{rest}".rstrip(".") for key, inner in value.items() for rest in words_auto(inner)]
    return [""] if value == "auto" else []


@pytest.mark.parametrize("world", [1, 2, 4])
def test_auto_is_filled_by_the_runs_settings(with_config, world):
    found = with_config(world=world, batch_size=8, lr=3e-4, max_grad_norm=0.7)
    assert found["train_micro_batch_size_per_gpu"] == 1
    assert found["gradient_accumulation_steps"] == 8 // world
    assert found["gradient_clipping"] == 0.7
    assert found["optimizer"]["params"]["lr"] == 3e-4
    assert found["optimizer"]["params"]["betas"] == [0.9, 0.95]
    assert found["zero_optimization"]["stage"] == 2
    assert found["bf16"] == {"enabled": True}
    assert words_auto(found) == []


@pytest.mark.parametrize("training", [torch.bfloat16, torch.float32])
def test_auto_precision_is_the_machines_and_a_written_one_stays(with_config, training):
    assert with_config(training=training)["bf16"] == {"enabled": training == torch.bfloat16}
    for written in (True, False):
        assert with_config({"bf16.enabled": written}, training=training)["bf16"] == {"enabled": written}


def test_deepspeed_does_not_wait_for_the_device_to_time_each_micro_step(with_config):
    from deepspeed.utils.config import get_timers_config

    assert get_timers_config(with_config()).enabled is False


def test_what_is_absent_is_filled_too(with_config):
    gone = ["optimizer", "gradient_clipping", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"]
    found = with_config(dict.fromkeys(gone), batch_size=6, lr=2e-4)
    assert found["gradient_accumulation_steps"] == 6
    assert found["gradient_clipping"] == 0.5
    assert found["optimizer"]["type"] == "Muon"
    assert found["optimizer"]["params"]["lr"] == 2e-4


def test_a_number_that_agrees_stays(with_config):
    found = with_config({"gradient_clipping": 0.5, "gradient_accumulation_steps": 4}, world=2, batch_size=8)
    assert found["gradient_clipping"] == 0.5
    assert found["gradient_accumulation_steps"] == 4


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("gradient_clipping", 1.0),
        ("gradient_accumulation_steps", 3),
        ("train_micro_batch_size_per_gpu", 2),
        ("optimizer.params.lr", 5e-5),
        ("optimizer.params.adam_lr", 5e-5),
        ("optimizer.type", "AdamW"),
        ("train_batch_size", 64),  # DeepSpeed's own word for the rows of a step
        ("scheduler", {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}),  # the run sets the learning rate
    ],
)
def test_a_clash_is_refused_with_the_key_named(with_config, place, value):
    error = refused(with_config, {place: value})
    assert f"'{place.split('.')[-1]}'" in error.where
    assert "ds.json" in error.where


def test_a_batch_size_that_agrees_is_no_clash(with_config):
    assert with_config({"train_batch_size": 8}, batch_size=8)["gradient_accumulation_steps"] == 8


@pytest.mark.parametrize(
    "place",
    [
        "train_batch_size",
        "optimizer.params.betas",
        "optimizer.params.eps",
        "optimizer.params.weight_decay",
        "bf16.enabled",
    ],
)
def test_no_auto_reaches_deepspeed(with_config, place):
    """Configs written for other trainers say "auto" in more places. Each is filled, or refused by its name."""
    found, where = {}, ""
    try:
        found = with_config({place: "auto"})
    except ConfigError as error:
        where = error.where
    assert words_auto(found) == []
    assert found or any(f"'{key}'" in where for key in place.split("."))


def test_bf16_without_zero_is_refused(with_config):
    error = refused(with_config, {"zero_optimization.stage": 0})
    assert "bf16" in error.where
    assert "stage 0" in error.what
    assert refused(with_config, {"zero_optimization": None})


@pytest.mark.parametrize("stage", [4, -1, "auto", "2"])
def test_other_stages_are_refused(with_config, stage):
    assert "zero_optimization" in refused(with_config, {"zero_optimization.stage": stage}).where


def test_fp16_is_refused(with_config):
    assert refused(with_config, {"bf16.enabled": False, "fp16": {"enabled": True}})


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_fp32_takes_stages_0_to_3(with_config, stage):
    found = with_config({"bf16.enabled": False, "zero_optimization.stage": stage})
    assert found["zero_optimization"]["stage"] == stage


@pytest.mark.parametrize(("rows", "world"), [(8, 3), (1, 2), (6, 4)])
def test_rows_that_the_ranks_cannot_share_are_refused(with_config, rows, world):
    error = refused(with_config, world=world, batch_size=rows)
    assert error.where == "--batch-size"
    assert str(world) in error.fix


@pytest.mark.parametrize(
    "content", [None, b"", b"{", b"[]", b"3", b"null", b"\xff\xfe", b'{"zero_optimization": 2}', b'{"bf16": true}']
)
def test_a_file_that_is_no_config_is_refused(tmp_path, content):
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        filled(path)
    assert str(path) in error.value.where


# Learning rate


@given(st.integers(1, 3000), st.floats(0, 0.99))
@settings(max_examples=50, deadline=None)
def test_the_learning_rate_rises_to_its_peak_and_falls_to_nearly_nothing(total, share):
    peak = 1.0
    rates = [share_of_peak(step, total, share) for step in range(total)]
    warmup = max(1, round(total * share))
    assert max(rates) == pytest.approx(peak)
    assert rates[min(warmup, total) - 1] == pytest.approx(peak)
    assert min(rates) > 0  # no step is wasted
    rise, fall = rates[:warmup], rates[warmup:]
    assert all(a < b for a, b in pairwise(rise))
    assert rise[0] == pytest.approx(peak / warmup)  # the first step already moves
    assert all(a >= b for a, b in pairwise(fall))
    if len(fall) > 100:
        assert fall[-1] < 0.001 * peak
        assert fall[len(fall) // 2] == pytest.approx(peak / 2, rel=0.05)  # half a cosine


def test_another_adam_than_torchs_is_refused(with_config):
    error = refused(with_config, {"optimizer.params.torch_adam": False})
    assert "torch_adam" in str(error.where)


@pytest.mark.parametrize(("optimizer", "there"), [("muon", "AdamW"), ("adamw", "Muon"), ("muon", "Lamb")])
def test_an_optimizer_that_contradicts_the_flag_is_refused(with_config, optimizer, there):
    error = refused(with_config, {"optimizer.type": there}, optimizer=optimizer)
    assert there in error.what
    assert "'type'" in error.where
    assert "--optimizer" in error.fix


@pytest.mark.parametrize(("optimizer", "there"), [("muon", "Muon"), ("adamw", "AdamW"), ("adamw", "adamw")])
def test_an_optimizer_that_agrees_stays(with_config, optimizer, there):
    found = with_config({"optimizer.type": there}, optimizer=optimizer)
    assert found["optimizer"]["type"].lower() == optimizer


def test_a_parameter_that_the_optimizer_lacks_is_refused(with_config):
    error = refused(with_config, {"optimizer.params.ns_steps": 3})
    assert "'ns_steps'" in error.where


def test_parameters_that_are_no_mapping_are_refused(with_config):
    assert "no mapping" in refused(with_config, {"optimizer.params": [1]}).what
