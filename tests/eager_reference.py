"""The EAGLE-3 training step as it is usually written: padded batches, every row, dense scores, the target's logits over
its whole vocabulary, the loss inside the loop, autograd throughout. `benchmarks/train_step.py` measures ours against
it, and knows it by its hash: it must not get slower, nor faster, from one measurement to the next."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms(x, weight, eps):
    return F.rms_norm(x, weight.shape, weight, eps)


def rotate(x_BTnE, positions, theta):
    dim = x_BTnE.shape[-1]
    angle = positions[:, None].float() / theta ** (torch.arange(0, dim, 2).float() / dim)
    cos, sin = (f(angle).repeat(1, 2)[None, :, None].to(x_BTnE.dtype) for f in (torch.cos, torch.sin))
    return x_BTnE * cos + torch.cat([-x_BTnE[..., dim // 2 :], x_BTnE[..., : dim // 2]], -1) * sin


def step_loss(w, config, embedding_VH, head_VH, kept_D, ids_BT, mask_BT, aux_BTA, last_BTH, steps, decay):
    """The loss of a padded batch: sum over steps i of decay^i x mean of the step's rows. w: parameters by their names
    on disk; mask_BT: assistant tokens (padding is none)."""
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    eps, theta = config.rms_norm_eps, config.rope_parameters["rope_theta"]
    batch, total = ids_BT.shape
    with torch.no_grad():
        teacher_BTV = last_BTH @ head_VH.T
        top1_BT = teacher_BTV.argmax(-1)
        p_BTD = teacher_BTV[..., kept_D].float().softmax(-1)
        known_V = torch.zeros(len(head_VH), dtype=torch.bool)
        known_V[kept_D] = True
        known_BT = known_V[top1_BT]
    causal = torch.full((total, total), float("-inf"), dtype=aux_BTA.dtype).triu(1)
    feature = aux_BTA @ w["fc.weight"].T
    keys, values = [], []
    loss = 0.0
    for i in range(steps):
        shifted_BT = F.pad(ids_BT[:, 1 + i :], (0, 1 + i))
        x = torch.cat(
            [
                rms(embedding_VH[shifted_BT], w["midlayer.input_layernorm.weight"], eps),
                rms(feature, w["midlayer.hidden_norm.weight"], eps),
            ],
            -1,
        )
        position = torch.arange(total) + i

        def project(name, count, x=x):
            return (x @ w[f"midlayer.self_attn.{name}_proj.weight"].T).view(batch, total, count, dim)

        q = rotate(project("q", heads), position, theta).transpose(1, 2)
        keys.append(
            rotate(project("k", kv_heads), position, theta).repeat_interleave(heads // kv_heads, 2).transpose(1, 2)
        )
        values.append(project("v", kv_heads).repeat_interleave(heads // kv_heads, 2).transpose(1, 2))
        scores = [q @ keys[0].transpose(-1, -2) / dim**0.5 + causal]
        scores += [(q * key).sum(-1, keepdim=True) / dim**0.5 for key in keys[1:]]
        shares = torch.cat(scores, -1).float().softmax(-1).to(q.dtype)
        out = shares[..., :total] @ values[0]
        for j, value in enumerate(values[1:]):
            out = out + shares[..., total + j : total + j + 1] * value
        h = feature + out.transpose(1, 2).reshape(batch, total, -1) @ w["midlayer.self_attn.o_proj.weight"].T
        y = rms(h, w["midlayer.post_attention_layernorm.weight"], eps)
        gate, up = y @ w["midlayer.mlp.gate_proj.weight"].T, y @ w["midlayer.mlp.up_proj.weight"].T
        h = h + (F.silu(gate) * up) @ w["midlayer.mlp.down_proj.weight"].T
        feature = h
        logits_BTD = rms(h, w["norm.weight"], eps) @ w["lm_head.weight"].T
        ahead = slice(1 + i, total)  # teacher rows of positions 0 .. total - 2 - i
        p, known = (F.pad(t[:, ahead], (*(0, 0) * (t.dim() - 2), 0, 1 + i)) for t in (p_BTD, known_BT))
        in_turn = torch.ones_like(mask_BT)
        for j in range(1, 3 + i):
            in_turn &= F.pad(mask_BT[:, j:], (0, j))
        counts = in_turn & known
        row_loss = -(p * logits_BTD.float().log_softmax(-1)).sum(-1)
        loss = loss + decay**i * (row_loss * counts).sum() / counts.sum().clamp(min=1)
    return loss
