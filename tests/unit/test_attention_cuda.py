"""The attention of a GPU without one: Python functions with the operators' signatures in their place, in fp64 against
one dense softmax; the operators themselves on fake tensors, for schema and shapes; what is kept for the backward."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from specforge.draft import step as step_module
from specforge.draft.attention import Efficient, Flash, PackedAttention, attend, attend_packed, dense, kernel_for
from specforge.draft.unroll import unroll
from tests.draft_memory import META, draft_step, kept_bytes, supervised_row
from tests.packed_attention import FILLED, LENGTHS, ROWS, TOTAL, inputs, worst
from tests.unit.test_draft_step import CONFIG, compare

# --- torch's operators in plain Python. What they leave as it was in memory is NaN here.


def pieces(starts):
    return [slice(a, b) for a, b in zip(starts.tolist(), starts.tolist()[1:], strict=False)]


def scores(q_nNE, k_nNE):
    unseen_nn = torch.ones(len(q_nNE), len(q_nNE), dtype=torch.bool).triu(1)
    s_Nnn = torch.einsum("qhe,khe->hqk", q_nNE, k_nNE) / math.sqrt(q_nNE.shape[-1])
    return s_Nnn.masked_fill(unseen_nn, float("-inf"))


def flash_forward(q, k, v, starts, starts_k, longest, longest_k, dropout, causal, debug, *, scale=None):
    assert (dropout, causal, debug, scale) == (0.0, True, False, None)
    assert starts.dtype == torch.int32
    assert torch.equal(starts, starts_k)
    assert longest == longest_k == max(part.stop - part.start for part in pieces(starts))
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    out, lse = torch.full_like(q, torch.nan), q.new_full((q.shape[1], len(q)), torch.nan)
    for part in pieces(starts):
        s_Nnn = scores(q[part], k[part])
        out[part] = torch.einsum("hqk,khe->qhe", s_Nnn.softmax(-1), v[part])
        lse[:, part] = s_Nnn.logsumexp(-1)
    seed, offset = torch.empty(2, dtype=torch.uint64), torch.empty((), dtype=torch.uint64)
    return out, lse, seed, offset, q.new_empty(0)


def flash_backward(grad, q, k, v, out, lse, starts, _k, _longest, _longest_k, dropout, causal, seed, offset):
    """As the kernels do it: P = exp(s - lse), D = rowsum(dO * O), both from what they are given."""
    assert (dropout, causal) == (0.0, True)
    assert (seed.shape, offset.shape) == ((2,), ())
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    wide_k, wide_v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    dq, dk, dv = (torch.full_like(x, torch.nan) for x in (q, wide_k, wide_v))
    for part in pieces(starts):
        p_Nnn = (scores(q[part], wide_k[part]) - lse[:, part, None]).exp()
        assert torch.isfinite(p_Nnn).all()
        dp_Nnn = torch.einsum("qhe,khe->hqk", grad[part], wide_v[part])
        d_Nn = (grad[part] * out[part]).sum(-1).T
        ds_Nnn = p_Nnn * (dp_Nnn - d_Nn[..., None]) / math.sqrt(q.shape[-1])
        dq[part] = torch.einsum("hqk,khe->qhe", ds_Nnn, wide_k[part])
        dk[part] = torch.einsum("hqk,qhe->khe", ds_Nnn, q[part])
        dv[part] = torch.einsum("hqk,qhe->khe", p_Nnn, grad[part])
    return dq, *(x.unflatten(1, (kv_heads, group)).sum(2) for x in (dk, dv))


def efficient_forward(q, k, v, bias, starts, starts_k, longest, longest_k, dropout, mask, with_lse, *, scale=None):
    """lse is [records, N, longest up to a multiple of 32]; the kernel writes infinity behind a record, up to a multiple
    of 32, and nothing behind that."""
    assert (bias, mask, with_lse) == (None, 1, True)
    assert q.shape[2] == k.shape[2] == v.shape[2], "the operator knows no grouped heads"
    bounds = (starts, starts_k, longest, longest_k)
    out, found, *_ = flash_forward(q[0], k[0], v[0], *bounds, dropout, True, False, scale=scale)
    lse = q.new_full((len(starts) - 1, q.shape[2], -(-longest // 32) * 32), torch.nan)
    for number, part in enumerate(pieces(starts)):
        size = part.stop - part.start
        lse[number, :, : -(-size // 32) * 32] = torch.inf
        lse[number, :, :size] = found[:, part]
    seed = torch.empty((), dtype=torch.int64)
    return out[None], lse, seed, seed.clone(), longest, longest_k


def efficient_backward(
    grad, q, k, v, bias, out, starts, starts_k, longest, longest_k, lse, dropout, seed, offset, mask, bias_grad
):
    assert (bias, mask, bias_grad) == (None, 1, False)
    assert lse.shape == (len(starts) - 1, q.shape[2], -(-longest // 32) * 32)
    assert (seed.shape, offset.shape) == ((), ())
    found = torch.full((q.shape[2], q.shape[1]), torch.nan, dtype=q.dtype)
    for number, part in enumerate(pieces(starts)):
        size = part.stop - part.start
        found[:, part] = lse[number, :, :size]
        assert torch.isposinf(lse[number, :, size : -(-size // 32) * 32]).all(), "the kernel reads these too"
    bounds = (starts, starts_k, longest, longest_k)
    of = (torch.empty(2), torch.empty(()))
    grads = flash_backward(grad[0], q[0], k[0], v[0], out[0], found, *bounds, dropout, True, *of)
    return *(x[None] for x in grads), torch.empty(())


PLAIN = {
    Flash: {"op": flash_forward, "backward_op": flash_backward},
    Efficient: {"op": efficient_forward, "backward_op": efficient_backward},
}
KINDS = pytest.mark.parametrize("kind", [Flash, Efficient])


class WithItsOwnLse(Flash):
    """What the kernel itself found, without the own columns."""

    def backward(self, grad_TNE, qkv, out_TNE, lse_NT, *of):
        return Flash.backward(self, grad_TNE, qkv, out_TNE, self.forward(*qkv)[1], *of)


class WithItsOwnOut(Flash):
    def backward(self, grad_TNE, qkv, out_TNE, lse_NT, *of):
        return Flash.backward(self, grad_TNE, qkv, self.forward(*qkv)[0], lse_NT, *of)


# --- Against the dense softmax


def plain(kind, lengths=LENGTHS, total=TOTAL, **given):
    return kind.over(lengths, total, torch.device("cpu"), **(PLAIN[kind] | given))


@KINDS
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 4), (4, 1)])
@pytest.mark.parametrize("own", range(8))
def test_output_and_gradients_are_those_of_the_dense_softmax(kind, own, heads, kv_heads):
    assert worst(inputs(own, heads, kv_heads), plain(kind)) < 1e-12


@KINDS
@pytest.mark.parametrize("lengths", [(*LENGTHS, TOTAL - sum(LENGTHS)), (TOTAL,)])
def test_rows_without_spare_tokens(kind, lengths):
    assert worst(inputs(2), plain(kind, lengths), lengths) < 1e-12


@pytest.mark.parametrize("broken", [WithItsOwnLse, WithItsOwnOut])
def test_a_backward_with_unmerged_parts_is_seen(broken):
    """Without own columns there is nothing to merge."""
    kernel = broken.over(LENGTHS, TOTAL, torch.device("cpu"), **PLAIN[Flash])
    assert worst(inputs(0), kernel) < 1e-12
    assert worst(inputs(3), kernel) > 1e-2


@KINDS
def test_records_that_see_each_other_are_seen(kind):
    assert worst(inputs(3), plain(kind, (45, *LENGTHS[2:]))) > 1e-2


@pytest.mark.parametrize("packed", [False, True])
def test_own_scores_are_not_rounded(packed):
    """100 and 100.625 in bf16, which holds 100.5 and 101: shares of 0.35 and 0.65."""
    q, k, own_k, zero, one = (torch.tensor([[[x]]], dtype=torch.bfloat16) for x in (10, 10, 10.0625, 0, 1))
    if packed:
        out = attend_packed(q, k, zero, [own_k], [one], torch.tensor([0]), plain(Flash, (1,), 1))
    else:
        out = dense(q, k, zero, torch.tensor([[False]]), own_k[None], one[None])
    assert float(out) == pytest.approx(1 / (1 + math.exp(-0.625)), abs=2e-3)


def test_no_rows_at_all():
    q, k, v = inputs(0)
    none = torch.empty(0, dtype=torch.int64)
    assert attend_packed(q[:0], k, v, [], [], none, plain(Flash)).shape == (0, *q.shape[1:])


# --- The whole draft step


@KINDS
@pytest.mark.parametrize("supervised", [1.0, 0.5, 0.1])
def test_a_draft_step_equals_the_dense_reference(kind, supervised, monkeypatch):
    """Loss and the gradient of every weight, over a packed row with records of no rows."""

    def packed(draft, embedding_VH, batch, steps):
        total = -(-sum(batch.lengths) // 64) * 64
        return unroll(draft, embedding_VH, batch, steps, plain(kind, batch.lengths, total))

    monkeypatch.setattr(step_module, "unroll", packed)
    compare(supervised, torch.float64, 1e-10)


# --- Torch's operators on fake tensors of a GPU. Without one torch has no autograd there: the two halves by hand.

WHICH = pytest.mark.parametrize(
    ("dtype", "size", "kind"),
    [
        (torch.bfloat16, 128, Flash),
        (torch.float16, 64, Flash),
        (torch.bfloat16, 256, Flash),
        (torch.float32, 128, Efficient),
        (torch.bfloat16, 320, Efficient),
        (torch.float16, 20, Efficient),
    ],
)


@WHICH
@pytest.mark.parametrize("own", [0, 1, 7])
def test_the_operators_take_what_they_are_given(dtype, size, kind, own):
    ctx = SimpleNamespace(save_for_backward=lambda *tensors: setattr(ctx, "saved_tensors", tensors))
    count = len(ROWS) + FILLED
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        q, k, v = (torch.empty(n, heads, size, dtype=dtype) for n, heads in ((count, 6), (TOTAL, 2), (TOTAL, 2)))
        owns = [torch.empty(count, 2, own, size, dtype=dtype) for _ in range(2)] if own else [None, None]
        assert kernel_for(k) is kind
        kernel = kind(lengths=(*LENGTHS, 7), starts=torch.empty(len(LENGTHS) + 2, dtype=torch.int32))
        rows_r = torch.empty(len(ROWS), dtype=torch.int64)
        out = PackedAttention.forward(ctx, q, k, v, *owns, rows_r, kernel)
        grads = PackedAttention.backward(ctx, torch.empty_like(out))
        wanted = [(x.shape, x.dtype, x.device.type) for x in (q, k, v, *owns) if x is not None]
        assert [(x.shape, x.dtype, x.device.type) for x in grads if x is not None] == wanted
        assert (out.shape, out.dtype, out.device.type) == (q.shape, dtype, "cuda")
        lse_rN = ctx.saved_tensors[7]
        assert (lse_rN.shape, lse_rN.dtype) == ((len(ROWS), 6), torch.float32)


# --- What is kept for the backward, on torch's meta device, through torch's own operators


def kept_by_attention(tokens, dtype, one_call):
    """With six own columns; the second half of the tokens has rows."""
    q, k, *own = (
        torch.empty(n, heads, 64, dtype=dtype, device=META, requires_grad=True)
        for n, heads in ((tokens // 2, 8), (tokens, 2), *[(tokens // 2, 2)] * 6)
    )
    rows_r = torch.arange(tokens // 2, tokens, device=META)
    if one_call:
        kernel = kernel_for(k).over((tokens // 4, tokens - tokens // 4), tokens, META)
        return kept_bytes(lambda: attend_packed(q, k, k, own, own, rows_r, kernel))
    segments = [(slice(0, tokens // 2), slice(0, tokens))]
    return kept_bytes(lambda: attend(q, k, k, own, own, rows_r, segments))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_keeps_bytes_in_proportion_to_the_tokens(dtype):
    one, two, four = (kept_by_attention(tokens, dtype, one_call=True) for tokens in (1024, 2048, 4096))
    assert four - two == pytest.approx(2 * (two - one), rel=1e-3)
    rows, heads, width = 512, 8, dtype.itemsize
    q_and_out, keys, own = 2 * rows * heads * 64 * width, 1024 * 2 * 64 * width, 2 * rows * 2 * 6 * 64 * width
    assert one == pytest.approx(q_and_out + keys + own + rows * heads * 4, rel=0.03)


def test_scores_that_are_kept_are_seen():
    """`dense` keeps them."""
    one, two, four = (kept_by_attention(tokens, torch.bfloat16, one_call=False) for tokens in (1024, 2048, 4096))
    assert four - two > 3 * (two - one)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_draft_step_keeps_bytes_in_proportion_to_the_tokens(dtype):
    step, found = draft_step(CONFIG, dtype), []
    frozen = [*step.parameters(), step.embedding_VH, step.frozen[1]]
    for tokens in (1024, 2048, 4096):
        batch = supervised_row(CONFIG, (tokens // 4, tokens - tokens // 4), dtype)
        found.append(kept_bytes(lambda: step(batch, step.loss_rows(batch)).loss.backward(), frozen))  # noqa: B023
    one, two, four = found
    assert four - two == pytest.approx(2 * (two - one), rel=1e-3)
