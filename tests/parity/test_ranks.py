"""The update does not depend on the number of ranks, on the ZeRO stage, or on DeepSpeed at all; also if ranks have no
row in a step, and if steps are skipped. For both optimizers.

Bounds. fp32: sums in another order were 3e-7 apart in the state and 8e-8 in the loss; a rank that fills ZeRO-2's
bucket in another order, 0.4. bf16: ZeRO sums gradients in bf16, plain torch in fp32; the losses were 2e-4 apart, as far
as from fp32 itself. A forgotten moment or one optimizer step changes the loss by 1 %."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import warm

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("ranks_worker.py")
OPTIMIZERS = ("Muon", "AdamW")
FP32_STATE, FP32_LOSS, BF16_LOSS = 1e-6, 1e-6, 1e-3


def state(
    output: Path,
    optimizer: str,
    kind: str,
    dtype: str,
    world: int,
    first: int = 0,
    last: int = 12,
    before: Path | None = None,
) -> dict[str, torch.Tensor]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    arguments = [output, optimizer, kind, dtype, world, first, last, *([before] if before else [])]
    done = warm.run([sys.executable, str(WORKER), *map(str, arguments)], ROOT, environment, timeout=200, ranks=world)
    assert done.returncode == 0, done.stdout[-3000:]
    return load_file(output)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """What plain torch gives on one rank, by optimizer and dtype; made when it is first asked for."""
    folder, known = tmp_path_factory.mktemp("plain"), {}

    def of(optimizer: str, dtype: str) -> dict[str, torch.Tensor]:
        if (optimizer, dtype) not in known:
            known[optimizer, dtype] = state(folder / f"{optimizer}-{dtype}", optimizer, "plain", dtype, 1)
        return known[optimizer, dtype]

    return of


def cases() -> list:
    """(optimizer, kind, dtype, world). `make test` runs some; the others are slow tests."""
    usual = {
        ("Muon", "0", "float32", 1),
        ("Muon", "1", "float32", 2),
        ("Muon", "2", "float32", 2),
        ("Muon", "3", "float32", 2),
        ("Muon", "2", "bfloat16", 2),
        ("AdamW", "2", "float32", 2),
    }
    found = [("plain", "float32", 2)]
    found += [(kind, "float32", world) for kind in ("0", "1", "2", "3", "2o", "3o") for world in (1, 2)]
    found += [(kind, "bfloat16", world) for kind in "123" for world in (1, 2)] + [("2o", "bfloat16", 2)]
    every = [(optimizer, *one) for optimizer in OPTIMIZERS for one in found]
    return [pytest.param(*one, marks=[] if one in usual else pytest.mark.proof) for one in every]


def apart(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).norm() / one.norm().clamp(min=1e-12))


@pytest.mark.parametrize(("optimizer", "kind", "dtype", "world"), cases())
def test_the_update_is_that_of_plain_torch_on_one_rank(tmp_path, plain, optimizer, kind, dtype, world):
    one, two = plain(optimizer, dtype), state(tmp_path / "state", optimizer, kind, dtype, world)
    assert one.keys() == two.keys()
    assert apart(one["losses"], two["losses"]) < (FP32_LOSS if dtype == "float32" else BF16_LOSS)
    if dtype == "float32":
        found = {name: apart(one[name], two[name]) for name in one}
        assert max(found.values()) < FP32_STATE, sorted(found.items(), key=lambda pair: -pair[1])[:3]


@pytest.mark.proof
@pytest.mark.parametrize("kind", ["2o", "3o"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_offloaded_run_goes_on_without_it(tmp_path, plain, optimizer, kind):
    """And the other way round: four steps each."""
    found, before = [], None
    for number, each in enumerate((kind, "2", kind)):
        output = tmp_path / f"part{number}"
        found.append(state(output, optimizer, each, "float32", 1, 4 * number, 4 * number + 4, before)["losses"])
        before = output
    torch.testing.assert_close(torch.cat(found), plain(optimizer, "float32")["losses"], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "kind", ["2", pytest.param("1", marks=pytest.mark.proof), pytest.param("3", marks=pytest.mark.proof)]
)
def test_a_resumed_run_holds_the_same_bits(tmp_path, kind):
    """Twelve steps at once, and six and six in processes of their own."""
    straight = state(tmp_path / "straight", "Muon", kind, "float32", 2)
    first = state(tmp_path / "first", "Muon", kind, "float32", 2, 0, 6)
    second = state(tmp_path / "second", "Muon", kind, "float32", 2, 6, 12, tmp_path / "first")
    second["losses"] = torch.cat([first["losses"], second["losses"]])
    assert [name for name in straight if not torch.equal(straight[name], second[name])] == []


@pytest.mark.parametrize("optimizer", ["Muon", pytest.param("AdamW", marks=pytest.mark.proof)])
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path, optimizer):
    """1, 2, 4 and 2 ranks in turn, against one throughout: the losses after each change."""
    straight = state(tmp_path / "straight", optimizer, "2", "float32", 1, 0, 32)["losses"]
    found, before = [], None
    for number, world in enumerate((1, 2, 4, 2)):
        output = tmp_path / f"part{number}"
        found.append(state(output, optimizer, "2", "float32", world, 8 * number, 8 * number + 8, before)["losses"])
        before = output
    torch.testing.assert_close(torch.cat(found), straight, rtol=1e-6, atol=0)
