"""The slow, obvious EAGLE-3 training step: every row, full logits, dense masks, loss inside the loop. No sharing with
the package but the parameters' names. Written to the contract, one record at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms(x, weight, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rotate(x_TnE, positions, rope):
    frequencies_e, factor = rope
    dim = x_TnE.shape[-1]
    angle = positions[:, None].to(x_TnE) * frequencies_e.to(x_TnE)
    cos, sin = (factor * f(angle).repeat(1, 2)[:, None] for f in (torch.cos, torch.sin))
    return x_TnE * cos + torch.cat([-x_TnE[..., dim // 2 :], x_TnE[..., : dim // 2]], -1) * sin


def step_losses(w, config, rope, embedding_VH, head_VH, kept, records, steps, kind="kl"):
    """Lists over steps of (sum of losses, loss rows), summed over records.

    w: parameters by their names on disk; rope: (a frequency for each pair of a head's elements, factor of cosine and
    sine); records: dicts of ids [T], mask [T], aux [T, 3H], last [T, H] (all tokens)."""
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    eps = config.rms_norm_eps
    sums = [0.0] * steps
    counts = [0] * steps
    hits = [0] * steps
    for record in records:
        ids, mask, aux, last = record["ids"], record["mask"], record["aux"], record["last"]
        total = len(ids)
        teacher_TV = last @ head_VH.T
        if config.norm_before_fc:
            aux = rms(aux, w["input_norm.weight"], eps)
        if config.fc_norm:
            third = aux.shape[1] // 3
            pieces = [aux[:, k * third : (k + 1) * third] for k in range(3)]
            aux = torch.cat([rms(piece, w[f"fc_norm.{k}.weight"], eps) for k, piece in enumerate(pieces)], -1)
        feature = aux @ w["fc.weight"].T
        all_keys, all_values = [], []
        for i in range(steps):
            shifted = torch.zeros(total, dtype=torch.int64)
            shifted[: max(total - 1 - i, 0)] = ids[1 + i :]
            x = torch.cat(
                [
                    rms(embedding_VH[shifted], w["midlayer.input_layernorm.weight"], eps),
                    rms(feature, w["midlayer.hidden_norm.weight"], eps),
                ],
                -1,
            )
            position = torch.arange(total) + i

            def project(name, count, x=x):
                return (x @ w[f"midlayer.self_attn.{name}_proj.weight"].T).view(len(x), count, dim)

            q = rotate(project("q", heads), position, rope)
            all_keys.append(rotate(project("k", kv_heads), position, rope).repeat_interleave(heads // kv_heads, 1))
            all_values.append(project("v", kv_heads).repeat_interleave(heads // kv_heads, 1))
            row, column = torch.arange(total)[:, None], torch.arange(total)[None]
            allowed = torch.cat([column <= row] + [column == row] * i, dim=1)
            scores = torch.einsum("tne,sne->nts", q, torch.cat(all_keys)) / dim**0.5
            shares = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
            out = torch.einsum("nts,sne->tne", shares, torch.cat(all_values)).reshape(total, -1)
            h = feature + out @ w["midlayer.self_attn.o_proj.weight"].T
            y = rms(h, w["midlayer.post_attention_layernorm.weight"], eps)
            gate, up = y @ w["midlayer.mlp.gate_proj.weight"].T, y @ w["midlayer.mlp.up_proj.weight"].T
            h = h + (F.silu(gate) * up) @ w["midlayer.mlp.down_proj.weight"].T
            feature = rms(h, w["norm.weight"], eps) if config.norm_output else h
            logits = rms(h, w["norm.weight"], eps) @ w["lm_head.weight"].T
            for t in range(total - 2 - i):
                in_turn = bool(mask[t + 1 : t + 3 + i].all())
                top1 = int(teacher_TV[t + 1 + i].argmax())
                if not in_turn or top1 not in kept:
                    continue
                p = teacher_TV[t + 1 + i][kept].softmax(-1)
                if kind == "kl":
                    row_loss = -(p * logits[t].log_softmax(-1)).sum()
                else:
                    row_loss = (
                        -torch.minimum(teacher_TV[t + 1 + i].softmax(-1)[kept], logits[t].softmax(-1)).sum().log()
                    )
                sums[i] = sums[i] + row_loss
                counts[i] += 1
                hits[i] += int(kept[logits[t].argmax()]) == top1
    return sums, counts, hits
