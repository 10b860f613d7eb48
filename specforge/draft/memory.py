"""Bytes on the device that a draft step takes, from the draft's shape alone: for a packed row whose every token counts
at every step, and the `kl` loss. tests/unit/test_plan.py counts the same on torch's meta device."""

from __future__ import annotations

from specforge.draft.loss import CHUNK
from specforge.draft.model import DraftConfig
from specforge.draft.unroll import MULTIPLE


def kept_bytes(config: DraftConfig, tokens: int, steps: int, width: int) -> int:
    """What forward keeps for the backward; `width` bytes a value."""
    tokens = -(-tokens // MULTIPLE) * MULTIPLE
    hidden, head = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    aux = len(config.aux_layers) * hidden * (1 + config.norm_before_fc + config.fc_norm)
    of_tokens = aux + 4 * hidden + 2 * keys  # aux states, feature, embedding, both normed; step-0 keys and values
    attended = 2 * hidden + 2 * queries  # input; q and output
    mlp = 2 * hidden + 4 * config.intermediate_size  # input, normed; gate, its activation, up, product
    of_loss = 2 * hidden  # state before the last norm, and its gradient
    later = (2 + config.norm_output) * hidden  # feature and embedding of the steps behind the first
    own = keys * steps * (steps - 1)  # keys and values of a row's earlier steps, once for each step that reads them
    values = of_tokens + steps * (attended + mlp + of_loss) + (steps - 1) * later + own
    wide = 2 * steps * head + steps * config.num_attention_heads  # fp32: cosine and sine of queries and keys, lse
    return tokens * (width * values + 4 * wide) + width * config.draft_vocab_size * hidden  # the head's gradient


def loss_bytes(config: DraftConfig, tokens: int, steps: int, width: int) -> int:
    """What the loss takes at its peak, beyond `kept_bytes`: in a chunk, either when its students' logits become
    probabilities or when its part of the head's gradient is made."""
    hidden, vocab = config.hidden_size, config.draft_vocab_size
    teachers = min(CHUNK, tokens)
    students = teachers * steps
    chunk = width * (students + teachers) * (vocab + hidden) + 4 * teachers * vocab  # probabilities, inputs; logits
    chunk += width * (students * hidden + vocab * max(0, students - hidden))  # the students' gradient; their logits
    return width * tokens * steps * hidden + 4 * vocab * hidden + chunk  # all states; the head's gradient in fp32
