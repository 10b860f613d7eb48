"""Muon: Newton-Schulz against singular values, the update against the formula, the layout over ranks, its cost."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from specforge.draft.model import Eagle3Draft
from specforge.train.muon import COEFFICIENTS, Muon, Partition, is_muon, orthogonal, orthogonal_flops
from tests.draft_memory import LLAMA_8B


def by_singular_values(update_nm):
    """What the iteration does, on singular values: vectors stay, each value goes through the quintic five times."""
    left, value, right = torch.linalg.svd(update_nm, full_matrices=False)
    a, b, c = COEFFICIENTS
    value = value / update_nm.norm()
    for _ in range(5):
        value = a * value + b * value**3 + c * value**5
    return left @ torch.diag(value) @ right


@pytest.mark.parametrize("shape", [(24, 24), (24, 72), (72, 24), (1, 9)])
def test_newton_schulz_changes_singular_values_only(shape):
    torch.manual_seed(0)
    update = torch.randn(shape, dtype=torch.float64)
    found = orthogonal(update, torch.float64)
    torch.testing.assert_close(found, by_singular_values(update), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(orthogonal(1e6 * update, torch.float64), found)  # the length of the update is no matter
    values = torch.linalg.svdvals(found)
    assert float(values.min()) > 0.3
    assert float(values.max()) < 1.3


def test_newton_schulz_of_nothing_is_nothing():
    """A draft's matrix may have no gradient in a step."""
    assert torch.equal(orthogonal(torch.zeros(4, 6), torch.float32), torch.zeros(4, 6))


def test_bf16_is_close_enough_to_be_an_update():
    """bf16 holds 8 bits; five steps on a [64, 96] matrix were 1.5 % off. A wrong coefficient is off by over 20 %."""
    torch.manual_seed(0)
    update = torch.randn(64, 96)
    exact = orthogonal(update, torch.float32)
    assert float((orthogonal(update, torch.bfloat16).float() - exact).norm() / exact.norm()) < 0.04


def trained(updates, weight_decay=0.0):
    """(matrix, vector) after these gradients."""
    torch.manual_seed(1)
    matrix, vector = torch.nn.Parameter(torch.randn(6, 10)), torch.nn.Parameter(torch.randn(10))
    groups = [{"params": [matrix], "muon": True, "lr": 0.02}, {"params": [vector], "lr": 0.001}]
    optimizer = Muon(groups, torch.float32, torch.device("cpu"), betas=(0.9, 0.95), weight_decay=weight_decay)
    for gradient, of_vector in updates:
        matrix.grad, vector.grad = gradient.clone(), of_vector.clone()
        optimizer.step()
    return matrix.detach(), vector.detach()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_update_is_that_of_the_formula(weight_decay):
    torch.manual_seed(2)
    updates = [(torch.randn(6, 10), torch.randn(10)) for _ in range(4)]
    found_matrix, found_vector = trained(updates, weight_decay)
    torch.manual_seed(1)
    matrix, vector = torch.randn(6, 10), torch.nn.Parameter(torch.randn(10))
    adam = torch.optim.AdamW([vector], lr=0.001, betas=(0.9, 0.95), weight_decay=weight_decay)
    momentum = torch.zeros(6, 10)
    for gradient, of_vector in updates:
        momentum = 0.95 * momentum + 0.05 * gradient
        step = by_singular_values(0.95 * momentum + 0.05 * gradient) * 0.2 * math.sqrt(10)
        matrix = (1 - 0.02 * weight_decay) * matrix - 0.02 * step
        vector.grad = of_vector.clone()
        adam.step()
    torch.testing.assert_close(found_matrix, matrix, rtol=1e-5, atol=1e-5)
    assert torch.equal(found_vector, vector.detach())


SHAPES = [torch.Size(shape) for shape in ((3, 5), (4, 4), (7, 2), (5, 9))]


def layouts(world):
    """ZeRO 1 and 2 (one run, padded at its end), and ZeRO 3 (each matrix a run of its own)."""
    total = sum(shape.numel() for shape in SHAPES)
    yield [tuple(SHAPES)], [-(-total // (2 * world)) * 2]
    yield [(shape,) for shape in SHAPES], [-(-shape.numel() // world) for shape in SHAPES]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_layout_gives_the_matrices_back(world):
    torch.manual_seed(3)
    matrices = [torch.randn(shape) for shape in SHAPES]
    for runs, parts in layouts(world):
        ranks = [Partition(runs=tuple(runs), parts=tuple(parts), rank=rank, world=world) for rank in range(world)]
        gathered = torch.stack([partition.own(matrices, [2.0] * 4, torch.float32) for partition in ranks])
        found = ranks[0].matrices(ranks[0].by_run(gathered))
        assert all(torch.equal(one, 2 * two) for one, two in zip(found, matrices, strict=True))


def test_each_matrix_has_one_owner_and_the_work_is_shared():
    names = {name: p.shape for name, p in eagle3_8b().named_parameters() if is_muon(name, p.shape)}
    partition = Partition(runs=(tuple(names.values()),), parts=(1,), rank=0, world=4)
    load = [0] * 4
    for owner, shape in zip(partition.owners(), names.values(), strict=True):
        load[owner] += orthogonal_flops([shape])
    assert max(load) < 0.32 * sum(load)  # 0.25 where it is equal; round robin gives 0.44


def eagle3_8b():
    with torch.device("meta"):
        return Eagle3Draft(LLAMA_8B)


def test_the_cost_of_a_step_for_the_draft_of_an_8b_target():
    """The formula is what torch counts: 27.2 TFLOP, against some 175 TFLOP of a training step over 16,384 tokens."""
    matrices = {name: p for name, p in eagle3_8b().named_parameters() if is_muon(name, p.shape)}
    assert sorted(name.split(".")[-2] for name in matrices) == (
        "down_proj fc gate_proj k_proj o_proj q_proj up_proj v_proj".split()
    )
    with FlopCounterMode(display=False) as counter:
        for matrix in matrices.values():
            orthogonal(matrix, torch.bfloat16)
    assert counter.get_total_flops() == orthogonal_flops(matrix.shape for matrix in matrices.values())
    assert counter.get_total_flops() == 27_165_668_147_200
