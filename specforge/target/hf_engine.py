"""The target in transformers: the oracle that SGLang is compared with, and the fallback where it cannot run."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from specforge.alignment import teacher_rows
from specforge.errors import EngineError, OutOfMemoryError, first_line, is_out_of_memory
from specforge.records import DecodeSession, Example, FeatureRecord, Prompt, Ranks, Sampling, TargetInfo
from specforge.target import same_head, teacher
from specforge.target.sampling import ended, generator, next_tokens

# Where SGLang, which serves, hands on something else than a layer's output: the part of the layer whose output it is.
# (Its Gemma 3 captures what a layer adds to the residual, without the residual.)
REDEFINED = {"gemma3_text": "post_feedforward_layernorm"}


class HfEngine:
    """TargetEngine over transformers, one sequence at a time. No tensor parallelism: each rank holds a copy."""

    name = "hf"

    def __init__(
        self,
        info: TargetInfo,
        aux_layers: tuple[int, ...],
        ranks: Ranks,
        *,
        dtype: torch.dtype,
        tokens_per_batch: int,
        trust_remote_code: bool = False,
    ) -> None:
        if ranks.tp_size > 1:
            raise EngineError(
                "the transformers engine has no tensor parallelism", where="--tp-size", fix="use --engine sglang"
            )
        self.info, self.aux_layers, self.tokens_per_batch = info, aux_layers, tokens_per_batch
        self.device, self.dtype = ranks.device, dtype
        self.on_pass: Callable[[], None] = lambda: None
        self.serves_eagle3 = True  # not known here; SGLang's engine says where it cannot
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            info.path, dtype=dtype, trust_remote_code=trust_remote_code
        )
        self._model.to(self.device).eval()
        self._redefined = dict[int, Tensor]()
        part = REDEFINED.get(str(info.config.get("model_type")))
        for number, layer in enumerate(self._model.get_decoder().layers if part else ()):
            layer.get_submodule(part).register_forward_hook(self._keeper(number))

    def _keeper(self, layer: int) -> Any:
        def keep(module: Any, args: Any, output: Tensor) -> None:
            self._redefined[layer] = output

        return keep

    @torch.no_grad()
    def _forward(self, ids: Sequence[int], cache: Any, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(aux [n, A], last [rows, H], logits [rows, V] float32) of the n appended tokens."""
        out = self._model(
            torch.tensor([list(ids)], device=self.device),
            past_key_values=cache,
            use_cache=cache is not None,
            output_hidden_states=True,
            logits_to_keep=rows,
        )
        self.on_pass()
        aux = torch.cat([self._redefined.get(k, out.hidden_states[k + 1])[0] for k in self.aux_layers], dim=-1)
        return aux, out.hidden_states[-1][0, rows], out.logits[0].float()

    def capture(self, examples: Sequence[Example]) -> list[FeatureRecord]:
        try:
            return self._capture(examples)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failure = first_line(error)
        if self.device.type == "cuda":  # out of the handler, whose error holds the frames and so the tensors
            torch.cuda.empty_cache()
        raise OutOfMemoryError(
            f"a pass of the target does not fit into memory: {failure}",
            where=self.info.path,
            fix="lower --max-length, or use --engine sglang with --tp-size",
        )

    def _capture(self, examples: Sequence[Example]) -> list[FeatureRecord]:
        records = []
        for example in examples:
            rows = torch.from_numpy(teacher_rows(example.loss_mask)).to(self.device)
            aux, last, logits = self._forward(example.token_ids.tolist(), None, rows)
            top1, lse = teacher.columns(logits)
            records.append(
                FeatureRecord(
                    sample_id=example.sample_id,
                    token_ids=torch.from_numpy(example.token_ids),
                    loss_mask=torch.from_numpy(example.loss_mask),
                    aux=aux,
                    last=last,
                    teacher_top1=top1.cpu(),
                    teacher_lse=lse,
                )
            )
        return records

    def session(self) -> DecodeSession:
        return _HfSession(self)

    def generate(self, waiting: deque[Prompt], sampling: Sampling, at_once: int) -> Iterator[tuple[int, list[int]]]:
        while waiting:
            prompt = waiting.popleft()
            draws = generator(prompt.seed, self.device)
            session, new, answer = self.session(), list(prompt.token_ids), list[int]()
            while not ended(answer, sampling):
                ((logits_1V, _),) = session.extend({0: [new]}, only_last=True)[0]
                session.keep(0, 0, len(new))
                new = next_tokens(logits_1V, sampling, [draws]).tolist()
                answer += new
            yield prompt.key, answer

    def self_check(self) -> None:
        ids = list(range(min(8, self.info.vocab_size)))
        aux, last, logits = self._forward(ids, None, torch.arange(len(ids), device=self.device))
        if not (torch.isfinite(aux).all() and torch.isfinite(last).all()):
            raise EngineError("the target's states are not finite", where=self.info.path, fix="try --dtype float32")
        teacher.check_logits(logits, self.info)
        embedding = self._model.get_input_embeddings()
        rows_nH = embedding(same_head.sampled(self.info.vocab_size).to(self.device)) if embedding else None
        same_head.check(self.info, rows_nH, last, logits)

    def close(self) -> None:
        del self._model


class _HfSession:
    """Path by path, each on a copy of its sequence's cache: slow and obvious."""

    def __init__(self, engine: HfEngine) -> None:
        self._engine = engine
        self._kept, self._lengths = dict[int, DynamicCache](), dict[int, int]()
        self._passed = dict[int, list[DynamicCache]]()  # of each path of the last pass

    def extend(
        self, paths: Mapping[int, Sequence[Sequence[int]]], only_last: bool = False
    ) -> dict[int, list[tuple[Tensor, Tensor]]]:
        assert not self._passed, "a sequence of the last pass was neither kept nor dropped"
        found: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for number, of_one in paths.items():
            kept = self._kept.get(number, DynamicCache())
            self._passed[number] = [kept if len(of_one) == 1 else copy.deepcopy(kept) for _ in of_one]
            found[number] = []
            for path, cache in zip(of_one, self._passed[number], strict=True):
                rows = torch.arange(len(path), device=self._engine.device)
                aux, _, logits = self._engine._forward(path, cache, rows[-1:] if only_last else rows)
                found[number].append((logits, aux))
        return found

    def keep(self, number: int, path: int, count: int) -> None:
        self._kept[number] = self._passed.pop(number)[path]
        self._lengths[number] = self._lengths.get(number, 0) + count
        self._kept[number].crop(self._lengths[number])

    def drop(self, number: int) -> None:
        for state in (self._kept, self._lengths, self._passed):
            state.pop(number, None)

    def close(self) -> None:
        self._kept, self._lengths, self._passed = {}, {}, {}
