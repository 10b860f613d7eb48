"""The training step against the dense reference: value and every gradient; and broken variants that must fail."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from specforge.alignment import teacher_rows
from specforge.draft import loss as loss_module
from specforge.draft import step as step_module
from specforge.draft import unroll as unroll_module
from specforge.draft.model import DraftConfig, Eagle3Draft, Rotary
from specforge.draft.step import DraftStep
from specforge.records import FeatureBatch, FeatureRecord, TargetHead
from specforge.train.loop import unrolled_steps
from tests.dense_reference import step_losses

STEPS, DECAY, V, H = 7, 0.8, 60, 32
CONFIG = DraftConfig(
    hidden_size=H,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-5,
    vocab_size=V,
    draft_vocab_size=40,
    max_position_embeddings=128,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    aux_layers=(1, 2, 3),
)
LENGTHS = (5, 23, 40, 2, 17)
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


def make(supervised: float, dtype: torch.dtype, seed: int = 0, config: DraftConfig = CONFIG):
    g = torch.Generator().manual_seed(seed)
    embedding = torch.randn(V, H, generator=g, dtype=dtype)
    head = TargetHead(embedding_VH=embedding, head_VH=torch.randn(V, H, generator=g, dtype=dtype))
    kept = torch.sort(torch.randperm(V, generator=g)[: config.draft_vocab_size]).values
    draft = Eagle3Draft(config).to(dtype)
    with torch.no_grad():
        for p in draft.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=dtype) * (0.2 if p.dim() == 2 else 0.5))
    dense, records = [], []
    for number, length in enumerate(LENGTHS):
        ids = torch.randint(0, V, (length,), generator=g)
        # turns in blocks, so that several turns end inside a record
        blocks = torch.rand(length // 6 + 1, generator=g) < supervised
        mask = blocks.repeat_interleave(6)[:length]
        aux = torch.randn(length, 3 * H, generator=g, dtype=dtype)
        last = torch.randn(length, H, generator=g, dtype=dtype)
        dense.append({"ids": ids, "mask": mask, "aux": aux, "last": last})
        rows = torch.from_numpy(teacher_rows(mask.numpy()))
        logits = head.logits(last[rows])
        records.append(
            FeatureRecord(
                sample_id=number,
                token_ids=ids.int(),
                loss_mask=mask,
                aux=aux,
                last=last[rows],
                teacher_top1=logits.argmax(-1).int(),
                teacher_lse=logits.logsumexp(-1),
            )
        )
    return draft, head, kept, dense, records


def ours(draft, head, kept, batches, steps=STEPS, kind="kl"):
    """(loss, per-step loss sums, counts, hits) with gradients accumulated into draft, over packed rows."""
    step = DraftStep(draft, head, kept, steps, DECAY, kind)
    normaliser = sum(step.loss_rows(batch) for batch in batches)
    results = [step(batch, normaliser) for batch in batches]
    loss = sum(result.loss for result in results)
    loss.backward()
    return loss, sum(r.loss_sum for r in results), sum(r.loss_rows for r in results), sum(r.hits for r in results)


def reference(draft, head, kept, dense, steps=STEPS, kind="kl"):
    weights = {n: p.detach().clone().requires_grad_() for n, p in draft.named_parameters()}
    rope = (draft.rotary.frequencies_e, draft.rotary.factor)
    found = step_losses(weights, draft.config, rope, head.embedding_VH, head.head_VH, kept, dense, steps, kind)
    sums, counts, hits = found
    loss = sum(DECAY**i * s / max(c, 1) for i, (s, c) in enumerate(zip(sums, counts, strict=True)))
    loss.backward()
    return loss, sums, counts, hits, weights


def difference(draft, weights):
    """The largest relative error of a gradient tensor."""
    return max(
        ((p.grad - weights[n].grad).norm() / weights[n].grad.norm().clamp(min=1e-12)).item()
        for n, p in draft.named_parameters()
    )


def pack(records, dtype):
    return FeatureBatch.pack(records, torch.device("cpu"), dtype)


def compare(supervised, dtype, bound, config=CONFIG, steps=STEPS, packed=True, kind="kl"):
    draft, head, kept, dense, records = make(supervised, dtype, config=config)
    batches = [pack(records, dtype)] if packed else [pack([record], dtype) for record in records]
    loss, sums, counts, hits = ours(draft, head, kept, batches, steps, kind)
    want_loss, want_sums, want_counts, want_hits, weights = reference(draft, head, kept, dense, steps, kind)
    assert sum(want_counts) > 0
    assert counts.tolist() == want_counts
    assert hits.tolist() == want_hits
    assert loss.item() == pytest.approx(want_loss.item(), rel=bound)
    want = torch.stack([torch.as_tensor(found).detach() for found in want_sums]).to(sums.dtype)
    torch.testing.assert_close(sums, want, rtol=bound, atol=bound)
    assert difference(draft, weights) < bound


BOUNDS = pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])


@BOUNDS
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("supervised", [1.0, 0.5, 0.1])
def test_equals_dense_reference(supervised, packed, dtype, bound):
    compare(supervised, dtype, bound, packed=packed)


@BOUNDS
@pytest.mark.parametrize("steps", range(1, STEPS))
def test_equals_dense_reference_at_every_number_of_steps(steps, dtype, bound):
    compare(0.5, dtype, bound, steps=steps)


@BOUNDS
@pytest.mark.parametrize("kind", ROPES)
def test_equals_dense_reference_with_every_rope(kind, dtype, bound):
    compare(0.5, dtype, bound, config=replace(CONFIG, rope_parameters=ROPES[kind]))


@BOUNDS
@pytest.mark.parametrize("norms", [{"fc_norm"}, {"norm_before_fc"}, {"norm_output"}, {"fc_norm", "norm_output"}])
def test_equals_dense_reference_with_the_norms_of_eagle_3_1(norms, dtype, bound):
    compare(0.5, dtype, bound, config=replace(CONFIG, **dict.fromkeys(norms, True)))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-6)])
@pytest.mark.parametrize("supervised", [1.0, 0.5, 0.1])
def test_equals_dense_reference_with_the_loss_of_acceptance(supervised, dtype, bound):
    """Its bound in fp64 is that of the stored logsumexp, which is fp32."""
    compare(supervised, dtype, bound, kind="lk")


@BOUNDS
@pytest.mark.parametrize("kind", ["kl", "lk"])
def test_equals_dense_reference_in_many_chunks(kind, dtype, bound, monkeypatch):
    """Chunks of eight teacher rows, some of which teach nobody; filled rows in each."""
    monkeypatch.setattr(loss_module, "CHUNK", 8)
    monkeypatch.setattr(loss_module, "MULTIPLE", 4)
    compare(0.5, dtype, bound if kind == "kl" else max(bound, 1e-6), kind=kind)


def _without_the_teachers_part_of_the_head(original):
    def broken(student_mH, head_DH, z_CD, *rest):
        found = original(student_mH, head_DH, z_CD, *rest)
        found.right_xH[-len(z_CD) :] = 0
        return found

    return broken


def _the_next_teacher(original):
    def broken(student_mH, head_DH, z_CD, lse_C, teacher_m, weight_m):
        return original(student_mH, head_DH, z_CD, lse_C, (teacher_m + 1) % len(z_CD), weight_m)

    return broken


def _every_step_alike(original):
    def broken(student_mH, head_DH, z_CD, lse_C, teacher_m, weight_m):
        return original(student_mH, head_DH, z_CD, lse_C, teacher_m, (weight_m > 0) * weight_m.max())

    return broken


def _filled_rows_with_weight(original):
    def broken(student_mH, head_DH, z_CD, lse_C, teacher_m, weight_m):
        filled_mH = torch.where((weight_m == 0)[:, None], student_mH[:1], student_mH)
        return original(filled_mH, head_DH, z_CD, lse_C, teacher_m, weight_m.where(weight_m != 0, weight_m.max()))

    return broken


@pytest.mark.parametrize(
    "broken",
    [_without_the_teachers_part_of_the_head, _the_next_teacher, _every_step_alike, _filled_rows_with_weight],
)
def test_the_comparison_notices_a_broken_loss(broken, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK", 8)
    monkeypatch.setattr(loss_module, "_kl", broken(loss_module._kl))
    draft, head, kept, dense, records = make(0.5, torch.float32)
    ours(draft, head, kept, [pack(records, torch.float32)])
    *_, weights = reference(draft, head, kept, dense)
    assert difference(draft, weights) > 1e-3


def test_the_comparison_notices_rows_that_are_left_out(monkeypatch):
    """Of step 1 on, the last row that counts."""
    original = unroll_module.filled

    def broken(rows_R):
        filled_R, count = original(rows_R)
        return filled_R, count - 1 if count < 60 else count

    monkeypatch.setattr(unroll_module, "filled", broken)
    draft, head, kept, dense, records = make(1.0, torch.float32)
    ours(draft, head, kept, [pack(records, torch.float32)])
    *_, weights = reference(draft, head, kept, dense)
    assert difference(draft, weights) > 1e-3


def frequencies(rope, dim):
    """Of each kind, from its definition: base theta^(-2k / dim), and what the kind does to it."""
    theta, factor = rope["rope_theta"], rope.get("factor", 1.0)
    plain = [theta ** (-2 * k / dim) for k in range(dim // 2)]
    original = rope.get("original_max_position_embeddings")
    if rope["rope_type"] == "linear":
        return [f / factor for f in plain], 1.0
    if rope["rope_type"] == "dynamic":  # as serving engines do: fixed, for the longest text
        theta *= (factor**2 - factor + 1) ** (dim / (dim - 2))
        return [theta ** (-2 * k / dim) for k in range(dim // 2)], 1.0
    if rope["rope_type"] == "llama3":
        found = []
        for f in plain:
            turns = original * f / (2 * math.pi)  # over the original length; full turns are kept, slow ones stretched
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            kept = min(max((turns - low) / (high - low), 0.0), 1.0)
            found.append(kept * f + (1 - kept) * f / factor)
        return found, 1.0
    if rope["rope_type"] == "yarn":

        def pair(turns):  # the pair of elements that makes so many turns over the original length
            return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = max(math.floor(pair(32)), 0), min(math.ceil(pair(1)), dim - 1)
        stretched = [min(max((k - low) / (high - low), 0.0), 1.0) for k in range(dim // 2)]
        mixed = [s * f / factor + (1 - s) * f for f, s in zip(plain, stretched, strict=True)]
        return mixed, 0.1 * math.log(factor) + 1
    return plain, 1.0


@pytest.mark.parametrize("kind", ROPES)
def test_rope_frequencies_are_their_definition(kind):
    rotary = Rotary(replace(CONFIG, rope_parameters=ROPES[kind]))
    want, factor = frequencies(ROPES[kind], CONFIG.head_dim)
    assert rotary.frequencies_e.tolist() == pytest.approx(want, rel=1e-5)
    assert rotary.factor == pytest.approx(factor)


def test_packed_equals_unpacked():
    draft, head, kept, _, records = make(0.6, torch.float32)
    packed = ours(draft, head, kept, [pack(records, torch.float32)])
    packed_grads = {n: p.grad.clone() for n, p in draft.named_parameters()}
    draft.zero_grad()
    single = ours(draft, head, kept, [pack([record], torch.float32) for record in records])
    assert packed[2].tolist() == single[2].tolist()
    assert packed[0].item() == pytest.approx(single[0].item(), rel=1e-6)
    for name, parameter in draft.named_parameters():
        torch.testing.assert_close(parameter.grad, packed_grads[name], rtol=1e-4, atol=1e-6)


def _no_own_keys(original):
    return lambda q, k, v, own_k, own_v, rows, segments: original(q, k, v, [], [], rows, segments)


def _one_key_later(original):
    def broken(q, k, v, own_k, own_v, rows, segments):
        return original(q, k, v, own_k, own_v, rows + 1, segments)

    return broken


def _across_records(original):
    def broken(q, k, v, own_k, own_v, rows, segments):
        return original(q, k, v, own_k, own_v, rows, [(r, slice(0, t.stop)) for r, t in segments])

    return broken


@pytest.mark.parametrize("broken", [_no_own_keys, _one_key_later, _across_records])
def test_the_comparison_notices_broken_attention(broken, monkeypatch):
    monkeypatch.setattr(unroll_module, "attend", broken(unroll_module.attend))
    draft, head, kept, dense, records = make(1.0, torch.float32)
    ours(draft, head, kept, [pack(records, torch.float32)])
    *_, weights = reference(draft, head, kept, dense)
    assert difference(draft, weights) > 1e-3


def test_the_comparison_notices_a_shifted_teacher(monkeypatch):
    original = step_module.unroll

    def shifted(draft, embedding, batch, steps):
        done = original(draft, embedding, batch, steps)
        return [
            unroll_module.UnrolledStep(rows_R=s.rows_R, hidden_RH=s.hidden_RH, teacher_R=(s.teacher_R - 1).clamp(min=0))
            for s in done
        ]

    monkeypatch.setattr(step_module, "unroll", shifted)
    draft, head, kept, dense, records = make(1.0, torch.float32)
    ours(draft, head, kept, [pack(records, torch.float32)])
    *_, weights = reference(draft, head, kept, dense)
    assert difference(draft, weights) > 1e-3


def test_a_batch_without_predictions_gives_zero():
    draft, head, kept, _, records = make(0.0, torch.float32)
    loss, _, counts, _ = ours(draft, head, kept, [pack(records, torch.float32)])
    assert loss.item() == 0.0
    assert counts.sum() == 0


@pytest.mark.parametrize("unrolled", [1, 3, STEPS])
def test_fewer_unrolled_steps_are_a_shorter_sum(unrolled):
    """What training begins with: the first steps alone, in value and in every gradient."""
    draft, head, kept, dense, records = make(0.8, torch.float64)
    step = DraftStep(draft, head, kept, STEPS, DECAY)
    step.unrolled = unrolled
    batch = pack(records, torch.float64)
    result = step(batch, step.loss_rows(batch))
    result.loss.backward()
    loss, sums, *_, weights = reference(draft, head, kept, dense, unrolled)
    torch.testing.assert_close(result.loss, loss, rtol=1e-9, atol=0)
    assert difference(draft, weights) < 1e-9
    assert result.loss_sum.tolist() == pytest.approx([*map(float, sums), *[0.0] * (STEPS - unrolled)])
    assert result.rows[unrolled:].tolist() == [0] * (STEPS - unrolled)


@pytest.mark.parametrize("growth", [0.0, 0.5, 1.0])
def test_the_unrolled_steps_grow_evenly_to_all(growth):
    found = [unrolled_steps(update, 140, STEPS, growth) for update in range(140)]
    assert found == sorted(found)
    assert found[-1] == STEPS
    counts = [found.count(steps) for steps in range(1, STEPS)]
    assert counts == [round(growth * 20)] * (STEPS - 1)
