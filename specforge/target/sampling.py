"""The next token of each answer: the most likely one, or one drawn from a seed of the answer's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specforge.records import Sampling


def ended(answer: Sequence[int], sampling: Sampling) -> bool:
    return len(answer) >= sampling.max_new_tokens or bool(answer and answer[-1] in sampling.stop_ids)


def generator(seed: int, device: torch.device) -> torch.Generator:
    """Of one answer's draws. Each answer has its own, so its draws do not depend on what runs beside it."""
    return torch.Generator(device).manual_seed(seed)


def next_tokens(logits_BV: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """[B] int64. At a temperature, token v wins with probability softmax(logits / temperature)[v]: an exponential race,
    argmax(logits / temperature - log E), E ~ Exp(1) (the Gumbel-max trick, Maddison et al. 2014).

    Unlike a search in cumulated probabilities, rounding changes the winner only where two tokens nearly tie."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    scaled_BV = logits_BV.float() / sampling.temperature
    if sampling.top_p < 1:
        scaled_BV = _nucleus(scaled_BV, sampling.top_p)
    race_BV = torch.stack(
        [torch.empty_like(row).exponential_(generator=g) for row, g in zip(scaled_BV, generators, strict=True)]
    )
    return (scaled_BV - race_BV.log()).argmax(-1)


def _nucleus(scaled_BV: Tensor, top_p: float) -> Tensor:
    """-inf outside the fewest most likely tokens whose probabilities add up to `top_p`."""
    sorted_BV, order_BV = scaled_BV.sort(descending=True)
    probability_BV = sorted_BV.softmax(-1)
    outside_BV = probability_BV.cumsum(-1) - probability_BV >= top_p
    return scaled_BV.masked_fill(torch.zeros_like(outside_BV).scatter(-1, order_BV, outside_BV), -torch.inf)
