"""The records that cross folders, and the protocols through which a folder uses another. All are frozen.

Legend of shape suffixes, used all over the project:

    T  tokens of a record, or of a packed row (records one after the other, no padding)
    S  teacher rows (alignment.py)           R  rows of one draft step
    H  hidden size of the target             A  3H, three aux hidden states side by side
    V  vocabulary of the target              D  draft vocabulary
    N  query heads    K  key/value heads     E  size of a head
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from specforge.alignment import prediction_depth, teacher_rows

if TYPE_CHECKING:  # conversations are read without torch too
    import torch
    from torch import Tensor
    from torch.distributed import ProcessGroup


def _cpu() -> torch.device:
    import torch

    return torch.device("cpu")


def sent(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor on `device`, without waiting for it: on CUDA by way of pinned memory, since a copy from other memory
    waits until all that is queued there is done."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, dtype or tensor.dtype, non_blocking=True)


MAX_EXAMPLES = 256  # examples in one pass of the target
HARDLY = 1.1  # acceptance length; an untrained draft, or one that reads another target's states, has 1.00 to 1.05
HEAD_LOGITS = 1 << 26  # of the target, that exist at once: some hundred rows over the whole vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn. `content` is "" where the row holds none, as beside tool calls."""

    role: str
    content: str
    reasoning: str | None = None  # what the assistant thought first, if the row keeps it apart
    tool_calls: tuple[Mapping[str, Any], ...] = ()  # {"type": "function", "function": {"name", "arguments"}}
    tool_call_id: str | None = None  # of the call that a tool turn answers
    name: str | None = None
    trained: bool = True  # False: the row marks the turn as context
    more: Mapping[str, Any] = field(default_factory=dict)  # keys of the turn that only its template knows

    def as_dict(self) -> dict[str, Any]:
        """As chat templates take it; what is absent is left out."""
        found: dict[str, Any] = {"role": self.role, "content": self.content, **self.more}
        if self.reasoning is not None:
            found["reasoning_content"] = self.reasoning
        if self.tool_calls:
            found["tool_calls"] = list(self.tool_calls)
        return found | {key: value for key in ("tool_call_id", "name") if (value := getattr(self, key)) is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Exact:
    """A row of tokens that belongs to a conversation: what the target was fed and what it wrote."""

    token_ids: Sequence[int]  # [T]
    loss_mask: Sequence[int]  # [T] 1 on what it wrote


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """One conversation as the user gave it."""

    id: str
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()  # JSON schemas of the tools that the assistant may call
    kwargs: Mapping[str, Any] = field(default_factory=dict)  # the row's chat_template_kwargs
    rows: tuple[Exact, ...] = ()  # the same as tokens, if the target itself wrote the answers
    tokenizer_hash: str = ""  # of the tokenizer of `rows`
    source: str = ""  # the data set that it came from
    domain: str = ""  # what it is about, if the row says so


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One conversation as the target reads it."""

    sample_id: int  # position in the data file's order; stable across ranks and resumes
    token_ids: NDArray[np.int32]  # [T]
    loss_mask: NDArray[np.bool_]  # [T] True on assistant tokens, end of turn included
    domain: str = ""  # by which acceptance is told apart: the row's `domain`, else its `source`


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What the target shall go on with."""

    key: int  # the caller's own name for it
    token_ids: Sequence[int]
    seed: int  # of its random draws alone: whatever else is in the batch, the same seed draws the same


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen, and when an answer ends."""

    max_new_tokens: int
    stop_ids: Sequence[int] = ()
    temperature: float = 0.0  # 0: the most likely token
    top_p: float = 1.0  # only the most likely tokens that together have this probability


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureRecord:
    """One conversation as the target saw it. Row t of a [T, ...] tensor belongs to token t; `draft.unroll` shifts.

    `token_ids`, `loss_mask` and `teacher_top1` are on the host, the others where the engine or the reader put them."""

    sample_id: int
    token_ids: Tensor  # [T] int32, exactly what the target was fed
    loss_mask: Tensor  # [T] bool
    aux: Tensor  # [T, A] outputs of the three aux layers
    last: Tensor  # [S, H] after the final norm, teacher rows only
    teacher_top1: Tensor  # [S] int32, argmax of the target's own logits over the whole vocabulary
    teacher_lse: Tensor  # [S] float32, logsumexp of the same logits

    def __len__(self) -> int:
        return len(self.token_ids)

    def copy(self) -> FeatureRecord:
        """In memory of its own: a view would keep the states of its whole pass alive."""
        return replace(self, aux=self.aux.clone(), last=self.last.clone())


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureBatch:
    """One packed row: whole records, one after the other, no padding. The unit of a draft step.

    What decides which rows are computed is on the host, so that nobody waits for the device to know their number."""

    sample_ids: tuple[int, ...]
    lengths: tuple[int, ...]
    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64, position inside the record
    aux: Tensor  # [T, A]
    last: Tensor  # [S, H]
    teacher_lse: Tensor  # [S] float32
    depth: Tensor  # [T] int64, on the host: draft steps of the row that count
    teacher_index: Tensor  # [T] int64, on the host: row of token t in the [S, ...] tensors, -1 where it has none
    teacher_top1: Tensor  # [S] int64, on the host

    @classmethod
    def pack(cls, records: Sequence[FeatureRecord], device: torch.device, dtype: torch.dtype) -> FeatureBatch:
        import torch

        lengths = [len(record) for record in records]
        mask_T = torch.cat([record.loss_mask for record in records]).numpy()
        teachers_S = torch.from_numpy(teacher_rows(mask_T, lengths))
        index_T = torch.full((sum(lengths),), -1, dtype=torch.int64)
        index_T[teachers_S] = torch.arange(len(teachers_S))

        def joined(name: str, to: torch.dtype) -> Tensor:
            return torch.cat([sent(getattr(record, name), device, to) for record in records])

        return cls(
            sample_ids=tuple(record.sample_id for record in records),
            lengths=tuple(lengths),
            token_ids=joined("token_ids", torch.int64),
            positions=sent(torch.cat([torch.arange(n) for n in lengths]), device),
            aux=joined("aux", dtype),
            last=joined("last", dtype),
            teacher_lse=joined("teacher_lse", torch.float32),
            depth=torch.from_numpy(prediction_depth(mask_T, lengths)),
            teacher_index=index_T,
            teacher_top1=torch.cat([record.teacher_top1 for record in records]).long(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetInfo:
    """What the draft must know of its target. Read from the target's folder; nothing of it is trained."""

    path: str
    fingerprint: str  # of config, and of names, shapes and bytes of every tensor
    config: dict[str, object]  # the target's text config as JSON
    hidden_size: int
    num_layers: int
    vocab_size: int
    dtype: torch.dtype  # as stored in the target's folder


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetHead:
    """The target's embedding and output head, for the draft's input and its teacher."""

    embedding_VH: Tensor
    head_VH: Tensor
    scale: float = 1.0  # logits are multiplied by it
    softcap: float | None = None  # logits become softcap * tanh(logits / softcap)

    def to(self, device: torch.device) -> TargetHead:
        embedding_VH = self.embedding_VH.to(device)
        tied = self.head_VH is self.embedding_VH
        return replace(self, embedding_VH=embedding_VH, head_VH=embedding_VH if tied else self.head_VH.to(device))

    def logits(self, last_SH: Tensor, head: Tensor | None = None) -> Tensor:
        """The target's own logits for hidden states after the final norm, over `head`'s rows (default: all)."""
        import torch

        logits = torch.nn.functional.linear(last_SH, self.head_VH if head is None else head)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This process's place in the run: `world` ranks in replicas of `tp_size`."""

    rank: int = 0
    world: int = 1
    tp_size: int = 1
    device: torch.device = field(default_factory=_cpu)
    tp_group: ProcessGroup | None = None  # the ranks of this replica; None where that is the whole world

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp_size

    @property
    def replica(self) -> int:
        return self.rank // self.tp_size

    @property
    def replicas(self) -> int:
        return self.world // self.tp_size

    def of_replica(self, slot: Sequence[Sequence[int]]) -> list[Sequence[int]]:
        """The rows of this replica's ranks, out of one row for each rank of the world."""
        first = self.replica * self.tp_size
        return list(slot[first : first + self.tp_size])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Acceptance:
    """Teacher-forced acceptance of a draft on held-out text: sums of each record. Lists run over the draft steps.

    Here N is records, K draft steps, B bins of the draft's probability."""

    sample_ids_N: NDArray[np.int64]
    rows_NK: NDArray[np.int64]  # rows where the step counts
    accepted_NK: NDArray[np.int64]  # of them, rows where this and all earlier drafts are the target's own choice
    walk_N2: NDArray[np.int64]  # tokens made by walking through each turn, and the passes of the target that it took
    known_N: NDArray[np.int64]  # teachers of step 0 that are in the draft vocabulary
    bins_3B: NDArray[np.float64] | None = None  # of step 0's rows, where asked for: sum of probabilities, hits, rows

    @property
    def rows(self) -> list[int]:
        return [int(n) for n in self.rows_NK.sum(0)]

    @property
    def accepted(self) -> list[int]:
        return [int(n) for n in self.accepted_NK.sum(0)]

    @property
    def walk_tokens(self) -> int:
        return int(self.walk_N2[:, 0].sum())

    @property
    def walk_passes(self) -> int:
        return int(self.walk_N2[:, 1].sum())

    @property
    def known(self) -> int:
        return int(self.known_N.sum())

    @property
    def share(self) -> list[float]:
        """P(the first j drafts are all accepted), j = 1 .. steps."""
        return [a / n if n else 0.0 for a, n in zip(self.accepted, self.rows, strict=True)]

    @property
    def lengths(self) -> list[float]:
        """`length` with k = 1 .. steps drafts for each pass."""
        return [1.0 + total for total in accumulate(self.share)]

    @property
    def length(self) -> float:
        """Expected tokens for each pass of the target, uniformly over rows: 1 + the sum of `share`."""
        return self.lengths[-1]

    @property
    def walk_length(self) -> float:
        """Tokens for each pass when every turn is walked through from its start, as decoding does."""
        return self.walk_tokens / self.walk_passes if self.walk_passes else 1.0

    @property
    def coverage(self) -> float:
        """Share of the teachers that the draft vocabulary holds."""
        return self.known / self.rows[0] if self.rows[0] else 0.0

    def of(self, which_N: NDArray[np.bool_]) -> Acceptance:
        """Of some of the records. Bins are not kept by record, so there are none."""
        return Acceptance(
            sample_ids_N=self.sample_ids_N[which_N],
            rows_NK=self.rows_NK[which_N],
            accepted_NK=self.accepted_NK[which_N],
            walk_N2=self.walk_N2[which_N],
            known_N=self.known_N[which_N],
        )

    def as_json(self) -> dict[str, object]:
        return {
            "acceptance_length": self.length,
            "walk_length": self.walk_length,
            "acceptance_by_position": self.share,
            "coverage": self.coverage,
            "predictions": self.rows[0],
        }


class DecodeSession(Protocol):
    """Several sequences side by side in the target, each under a number that the caller gives, with their KV caches.

    A pass appends to each sequence one or more paths, all of them behind what is kept of it: a tree of tokens as its
    root-to-leaf paths, so that no attention backend needs a mask. After a pass each of its sequences is either kept or
    dropped before the next."""

    def extend(
        self, paths: Mapping[int, Sequence[Sequence[int]]], only_last: bool = False
    ) -> dict[int, list[tuple[Tensor, Tensor]]]:
        """One pass. A number that was not seen before begins a sequence. For each sequence and path: the target's
        logits [n, V] float32 and aux states [n, A] of the path's n tokens; with `only_last` logits [1, V]."""

    def keep(self, number: int, path: int, count: int) -> None:
        """The first `count` tokens of this path of the last pass now belong to the sequence; the rest of the pass is
        forgotten and its places are free at once."""

    def drop(self, number: int) -> None:
        """The sequence has ended; its places are free."""

    def close(self) -> None:
        """Free the cache. An engine has one open session at a time."""


class TargetEngine(Protocol):
    """The target model. Every rank of a tensor-parallel group makes the same calls in the same order.

    `capture` runs each example whole, unpadded and in one piece, and returns its records in the order given, on the
    engine's device. One call takes MAX_EXAMPLES examples and `tokens_per_batch` tokens at most (what was asked for, or
    less where memory leaves a smaller KV cache). It raises OutOfMemoryError on all ranks of the replica where one of
    them lacks memory; the engine can be used further.
    """

    name: str
    info: TargetInfo
    aux_layers: tuple[int, ...]  # id k: output of layer k
    tokens_per_batch: int
    device: torch.device
    dtype: torch.dtype  # in which the target runs
    serves_eagle3: bool  # whether SGLang can serve a draft for this target
    on_pass: Callable[[], None]  # called after each forward pass; whoever wants to see progress sets it

    def capture(self, examples: Sequence[Example]) -> list[FeatureRecord]: ...

    def session(self) -> DecodeSession: ...

    def generate(self, waiting: deque[Prompt], sampling: Sampling, at_once: int) -> Iterator[tuple[int, list[int]]]:
        """Takes prompts from the left of `waiting`, at most `at_once` at a time, and gives (key, new tokens) of each as
        soon as it has ended, the stop token included where it was reached. Ends when nothing waits and nothing runs:
        whoever iterates may add prompts meanwhile. A prompt and `max_new_tokens` together must fit into
        `tokens_per_batch` and into the target's context."""

    def self_check(self) -> None:
        """Raises EngineError unless states are finite, equal on all ranks, and give the engine's own next token."""

    def close(self) -> None: ...


class DraftJudge(Protocol):
    """A server's own draft class, with a draft's folder loaded as that server loads it."""

    def logits(self, record: FeatureRecord) -> Tensor:
        """[T, D] float32: at each token the logits of draft step 0, from the record's aux states and the token that
        follows (the last row has none and means nothing)."""


class RecordSource(Protocol):
    """Where features come from: the store, or the live engine. Both give the same records for the same rows."""

    lengths: NDArray[np.int64]  # [records] tokens of each record

    @property
    def kind(self) -> str:
        """What the time is spent on: "data" or "target"."""

    def batches(self, slots: Sequence[Sequence[Sequence[int]]]) -> Iterator[list[FeatureRecord]]:
        """For each slot in turn the records of this rank's row. A slot holds a row (record indices, maybe none) for
        each rank of the replica; all of them must iterate over the same slots."""
