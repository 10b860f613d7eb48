"""SGLang's ModelRunner without its scheduler: whole sequences in, auxiliary hidden states of every token out."""

from __future__ import annotations

import contextlib
import json
import os
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
import xxhash
from torch import Tensor

from specforge import hardware
from specforge.alignment import teacher_rows
from specforge.errors import EngineError, OutOfMemoryError, first_line, is_out_of_memory
from specforge.records import (
    HEAD_LOGITS,
    MAX_EXAMPLES,
    DecodeSession,
    Example,
    FeatureRecord,
    Prompt,
    Ranks,
    Sampling,
    TargetInfo,
)
from specforge.target import same_head, teacher
from specforge.target.sampling import ended, generator, next_tokens
from specforge.target.sglang import names as sgl
from specforge.target.sglang.layers import LayerHooks
from specforge.target.teacher import Shard


class SglangEngine:
    """TargetEngine over an embedded SGLang. One instance a process: SGLang keeps global state."""

    name = "sglang"

    def __init__(
        self,
        info: TargetInfo,
        aux_layers: tuple[int, ...],
        ranks: Ranks,
        *,
        dtype: torch.dtype,
        tokens_per_batch: int,
        mem_frac: float,
        trust_remote_code: bool = False,
        answers: bool = False,
    ) -> None:
        """`answers`: on a GPU the KV pool takes what `mem_frac` leaves, for many answers at once; else one batch."""
        self.info, self.aux_layers = info, aux_layers
        self.device, self.dtype, self._ranks = ranks.device, dtype, ranks
        self.on_pass: Callable[[], None] = lambda: None
        whole = answers and self.device.type == "cuda"
        self._runner = _load_runner(info, ranks, dtype, tokens_per_batch, mem_frac, trust_remote_code, whole)
        # Less than one batch where memory is short.
        self._pool: int = self._runner.token_to_kv_pool_allocator.available_size()
        self.tokens_per_batch = min(tokens_per_batch, self._pool)
        model = self._runner.model
        layers = None
        self.serves_eagle3 = hasattr(model, "set_eagle3_layers_to_capture")
        if self.serves_eagle3:
            model.set_eagle3_layers_to_capture(list(aux_layers))
        else:
            layers = LayerHooks(model, info.num_layers, aux_layers)
        self._hook = _LogitsHook(layers)
        # A multimodal wrapper has its processor in the language model, or two of which one never runs.
        for processor in (module for module in model.modules() if isinstance(module, sgl.LogitsProcessor)):
            if self.device.type == "cpu":  # SGLang's soft cap is a Triton kernel on platforms it does not know as CPU
                self._hook.softcaps[processor] = processor.final_logit_softcapping
                processor.final_logit_softcapping = None
            processor.register_forward_pre_hook(self._hook, with_kwargs=True)

    def capture(self, examples: Sequence[Example]) -> list[FeatureRecord]:
        records, failure = None, None
        try:
            records = self._capture(examples)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failure = first_line(error)
        # Out of the handler, whose error holds the frames and so the tensors of the pass. A rank that had the memory
        # learns here that another had not, so that all go on with the same smaller passes.
        if self._any_rank(failure is not None):
            records = None
            self._hook.forget()
            self._clear()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            raise OutOfMemoryError(
                f"a pass of {sum(len(example.token_ids) for example in examples)} tokens does not fit into memory: "
                f"{failure or 'another rank of the replica had too little'}",
                where=self.info.path,
                fix="lower --tokens-per-batch or --mem-frac, or raise --tp-size",
            )
        assert records is not None
        return records

    def _any_rank(self, here: bool) -> bool:
        """Whether it is so on any rank of the replica."""
        if self._ranks.tp_size == 1:
            return here
        flag = torch.tensor(int(here))
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=sgl.get_tp_group().cpu_group)
        return bool(flag)

    def _agree(self, drafted: Sequence[tuple[int, list[int]]]) -> None:
        """Each tensor-parallel rank drafts for itself, from the same states. Raises EngineError where they differ."""
        if self._ranks.tp_size == 1:
            return
        own = xxhash.xxh3_64_intdigest(json.dumps(drafted).encode()) >> 1
        both = torch.tensor([own, -own])
        dist.all_reduce(both, dist.ReduceOp.MAX, group=sgl.get_tp_group().cpu_group)
        if both[0] != -both[1]:
            raise EngineError(
                "the tensor-parallel ranks drafted different tokens from the same states",
                where=self.info.path,
                fix="report it with the kind of GPU; benchmark with --tp-size 1 or --server meanwhile",
            )

    def _capture(self, examples: Sequence[Example]) -> list[FeatureRecord]:
        lengths = [len(example.token_ids) for example in examples]
        rows_S = teacher_rows(np.concatenate([example.loss_mask for example in examples]), lengths)
        counts = np.diff(np.searchsorted(rows_S, np.cumsum(lengths)), prepend=0).tolist()  # of each example
        self._hook.rows = self._on_device(torch.from_numpy(rows_S))
        self._prefill([example.token_ids.tolist() for example in examples])
        seen = self._hook
        teachers = zip(seen.last.split(counts), seen.top1.cpu().split(counts), seen.lse.split(counts), strict=True)
        return [
            FeatureRecord(
                sample_id=example.sample_id,
                token_ids=torch.from_numpy(example.token_ids),
                loss_mask=torch.from_numpy(example.loss_mask),
                aux=aux_TA,
                last=last_SH,
                teacher_top1=top1_S,
                teacher_lse=lse_S,
            )
            for example, aux_TA, (last_SH, top1_S, lse_S) in zip(
                examples, seen.aux.split(lengths), teachers, strict=True
            )
        ]

    def session(self) -> DecodeSession:
        page = sgl.get_schedule().page_size
        if page > 1:
            raise EngineError(
                f"SGLang keeps this target's KV cache in pages of {page} tokens; decoding here needs pages of one",
                where=self.info.path,
                fix="benchmark through a server: --server URL, or --launch",
            )
        return _Session(self)

    @torch.no_grad()
    def generate(self, waiting: deque[Prompt], sampling: Sampling, at_once: int) -> Iterator[tuple[int, list[int]]]:
        """Continuous batching: a prompt joins as soon as its tokens fit beside those that run, and an answer that has
        ended gives its places in the KV pool back. Every rank draws from the same logits with the same seeds."""
        self._hook.rows = None
        running = list[_Running]()
        batch: Any = None
        try:
            while waiting or running:
                joining = self._admit(waiting, running, sampling, at_once)
                if joining:
                    step, logits = self._extend([list(one.prompt.token_ids) for one in joining])
                else:
                    step = batch
                    step.prepare_for_decode()
                    logits = self._forward(step)
                stepped = joining or running
                draws = [one.draws for one in stepped]
                step.input_ids = next_tokens(self._hook.capped(logits), sampling, draws).to(torch.int64)
                for one, token in zip(stepped, step.input_ids.tolist(), strict=True):
                    one.answer.append(token)
                going = [at for at, one in enumerate(stepped) if not ended(one.answer, sampling)]
                self._keep(step, going)
                if joining and running and going:
                    batch.merge_batch(step)
                elif going:
                    batch = step
                running = (running if joining else []) + [stepped[at] for at in going]
                for one in stepped:
                    if ended(one.answer, sampling):
                        yield one.prompt.key, one.answer
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise EngineError(
                f"{len(running)} answers at once do not fit into memory: {first_line(error)}",
                where=self.info.path,
                fix="lower --tokens-per-batch or --concurrency; the same command goes on where it was",
            ) from error
        finally:
            self._clear()

    def _admit(
        self, waiting: deque[Prompt], running: Sequence[_Running], sampling: Sampling, at_once: int
    ) -> list[_Running]:
        """The prompts at the left of `waiting` that fit into one pass, and whose whole answers fit beside those that
        run."""
        free = self._pool - sum(len(one.prompt.token_ids) + sampling.max_new_tokens for one in running)
        room = self.tokens_per_batch
        joining = list[_Running]()
        while waiting and len(running) + len(joining) < min(at_once, MAX_EXAMPLES):
            free -= len(waiting[0].token_ids) + sampling.max_new_tokens
            room -= len(waiting[0].token_ids)
            if free < 0 or room < 0:
                break
            prompt = waiting.popleft()
            joining.append(_Running(prompt=prompt, draws=generator(prompt.seed, self.device), answer=[]))
        return joining

    def _keep(self, batch: Any, going: list[int]) -> None:
        """Only these requests stay in the batch; the others give back their places in both pools."""
        rows, slots = self._runner.req_to_token_pool, self._runner.token_to_kv_pool_allocator
        for at in set(range(len(batch.reqs))) - set(going):
            request = batch.reqs[at]
            used = rows.req_to_token[request.kv.req_pool_idx, : int(batch.seq_lens_cpu[at])]
            slots.free(used.to(torch.int64))
            rows.free(request)
        batch.filter_batch(keep_indices=going)

    def self_check(self) -> None:
        """See the protocol. On a GPU kernels and reductions depend on the number of tokens, up to 2,048 of them."""
        for length in (16, min(2049, self.tokens_per_batch)) if self.device.type == "cuda" else (16,):
            self._check_pass(length)
        self._check_head()

    def _check_head(self) -> None:
        """Some short sequences, and what the engine makes of the last state of each."""
        count, length = same_head.STATES, 4
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, self.info.vocab_size, (count, length), generator=generator).tolist()
        self._hook.rows = self._on_device(torch.arange(1, count + 1) * length - 1)
        emitted_kV = self._prefill(ids).float()
        same_head.check(self.info, self._embedded(), self._hook.last, emitted_kV, capped=not self._hook.softcaps)

    def _check_pass(self, length: int) -> None:
        """One prefill. Catches deferred all-reduces (partial sums) and a wrong head."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, self.info.vocab_size, (length,), generator=generator).tolist()
        self._hook.rows = self._on_device(torch.arange(length))
        emitted_V = self._prefill([ids])[-1].float()
        states = torch.cat([self._hook.aux.flatten(), self._hook.last.flatten()])
        fix = "report the model and SGLang's version; --engine hf works meanwhile"
        if not torch.isfinite(states).all():
            raise EngineError("the target's states are not finite", where=self.info.path, fix="try --dtype bfloat16")
        teacher.check_logits(emitted_V, self.info)
        best = int(self._hook.top1[-1])
        # The two come from products of other numbers of rows: in 16 bits the two best logits may change places.
        step = float(emitted_V.max().abs()) * torch.finfo(self.dtype).eps
        if not emitted_V[best] >= emitted_V.max() - step:
            raise EngineError("argmax(lm_head(last)) is not the token that SGLang emits", where=self.info.path, fix=fix)
        if self._ranks.tp_size > 1:
            group = self._ranks.tp_group
            every = [torch.empty_like(states) for _ in range(self._ranks.tp_size)]
            dist.all_gather(every, states, group=group)
            if not all(torch.equal(states, other) for other in every):
                raise EngineError("the tensor-parallel ranks hold different states", where=self.info.path, fix=fix)

    def _embedded(self) -> Tensor | None:
        """The embedding's rows for the sampled tokens; None for a model that has none of the usual kind."""
        ids_n = self._on_device(same_head.sampled(self.info.vocab_size))
        for module in self._runner.model.modules():
            whole = isinstance(module, sgl.VocabParallelEmbedding) and not isinstance(module, sgl.ParallelLMHead)
            if whole and (module.org_vocab_size, module.embedding_dim) == (self.info.vocab_size, self.info.hidden_size):
                with torch.no_grad():
                    return module(ids_n)
        return None

    def close(self) -> None:
        self._clear()
        del self._runner

    # What follows is SGLang's own order of calls for a batch, as in its one_batch benchmark.

    @torch.no_grad()
    def _prefill(self, sequences: list[list[int]]) -> Tensor:
        """One ragged, unpadded forward over whole sequences; next-token logits [sequences, V]."""
        _, logits = self._extend(sequences)
        self._clear()
        return logits

    def _extend(self, sequences: list[list[int]], prefixes: Sequence[Tensor] = ()) -> tuple[Any, Tensor]:
        """`prefixes`: for each sequence the places of its first tokens in the KV pool, where they are there already.
        Several sequences may share them."""
        runner, requests = self._runner, []
        for number, ids in enumerate(sequences):
            request = sgl.Req(
                rid=str(number),
                origin_input_text="",
                origin_input_ids=array("q", ids),
                sampling_params=sgl.SamplingParams(temperature=0, max_new_tokens=1),
            )
            request.full_untruncated_fill_ids = request.origin_input_ids
            request.logprob_start_len = -1
            if prefixes:
                request.prefix_indices = prefixes[number]
            request.set_extend_range(len(request.prefix_indices), len(ids))
            requests.append(request)
        batch = sgl.ScheduleBatch.init_new(
            reqs=requests,
            req_to_token_pool=runner.req_to_token_pool,
            token_to_kv_pool_allocator=runner.token_to_kv_pool_allocator,
            tree_cache=sgl.TreeCacheNamespace(
                page_size=sgl.get_schedule().page_size,
                device=runner.device,
                token_to_kv_pool_allocator=runner.token_to_kv_pool_allocator,
            ),
            model_config=runner.model_config,
            enable_overlap=False,
            spec_algorithm=sgl.SpeculativeAlgorithm.NONE,
        )
        batch.prepare_for_extend()
        if batch.input_ids is None:
            batch.input_ids = batch.prefill_input_ids_cpu.to(batch.device, non_blocking=True)  # pinned
            batch.prefill_input_ids_cpu = None
        return batch, self._forward(batch)

    def _on_device(self, rows: Tensor) -> Tensor:
        """Copied before the forward, without a wait."""
        return (rows.pin_memory() if self.device.type == "cuda" else rows).to(self.device, non_blocking=True)

    def _forward(self, batch: Any) -> Tensor:
        forward_batch = sgl.ForwardBatch.init_new(batch, self._runner, return_hidden_states_before_norm=False)
        logits: Tensor = self._runner.forward(forward_batch).logits_output.next_token_logits
        self.on_pass()
        return logits

    def _clear(self) -> None:
        self._runner.req_to_token_pool.clear()
        self._runner.token_to_kv_pool_allocator.clear()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Running:
    """An answer that is being written."""

    prompt: Prompt
    draws: torch.Generator
    answer: list[int]


class _Session:
    """Paths are requests of one extend batch that share the places of their sequence's kept tokens in the KV pool."""

    def __init__(self, engine: SglangEngine) -> None:
        self._engine = engine
        self._ids, self._slots = dict[int, list[int]](), dict[int, Tensor]()  # what is kept
        self._passed = dict[int, list[tuple[list[int], Tensor]]]()  # ids and places of each path of the last pass
        engine._clear()

    @torch.no_grad()
    def extend(
        self, paths: Mapping[int, Sequence[Sequence[int]]], only_last: bool = False
    ) -> dict[int, list[tuple[Tensor, Tensor]]]:
        assert not self._passed, "a sequence of the last pass was neither kept nor dropped"
        for number in paths:
            self._ids.setdefault(number, [])
            self._slots.setdefault(number, torch.empty(0, dtype=torch.int64, device=self._engine.device))
        flat = [(number, list(path)) for number, of_one in paths.items() for path in of_one]
        engine, lengths = self._engine, [len(path) for _, path in flat]
        engine._agree(flat)
        engine._runner.req_to_token_pool.clear()
        rows = torch.tensor(lengths).cumsum(0) - 1 if only_last else torch.arange(sum(lengths))
        engine._hook.rows = engine._on_device(rows)
        engine._hook.keep_logits = True
        sequences, prefixes = [self._ids[n] + path for n, path in flat], [self._slots[n] for n, _ in flat]
        try:
            batch, _ = engine._extend(sequences, prefixes)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise EngineError(
                f"{len(flat)} paths of {sum(lengths)} tokens do not fit into memory: {first_line(error)}",
                where=engine.info.path,
                fix="lower --batch-size, --draft-tokens or --mem-frac",
            ) from error
        finally:
            engine._hook.keep_logits = False
        found: dict[int, list[tuple[Tensor, Tensor]]] = {number: [] for number in paths}
        self._passed = {number: [] for number in paths}
        logits = engine._hook.logits.split([1] * len(flat) if only_last else lengths)
        slots = batch.out_cache_loc.to(torch.int64).split(lengths)
        pieces = zip(flat, logits, engine._hook.aux.split(lengths), slots, strict=True)
        for (number, path), logits_nV, aux_nA, slots_n in pieces:
            found[number].append((logits_nV, aux_nA))
            self._passed[number].append((path, slots_n))
        return found

    def keep(self, number: int, path: int, count: int) -> None:
        passed = self._passed.pop(number)
        ids, slots_n = passed[path]
        self._ids[number] += ids[:count]
        self._slots[number] = torch.cat([self._slots[number], slots_n[:count]])
        others = [slots for at, (_, slots) in enumerate(passed) if at != path]
        self._engine._runner.token_to_kv_pool_allocator.free(torch.cat([slots_n[count:], *others]))

    def drop(self, number: int) -> None:
        passed = [slots for _, slots in self._passed.pop(number, [])]
        self._engine._runner.token_to_kv_pool_allocator.free(torch.cat([self._slots.pop(number), *passed]))
        del self._ids[number]

    def close(self) -> None:
        self._engine._clear()


class _LogitsHook:
    """Reads the inputs of the logits processor: every token, after all reductions, before any pruning.

    The teacher columns come from SGLang's own head product, its scale and its soft cap. Each rank reduces its own shard
    of the vocabulary, and the ranks exchange three numbers a row. SGLang's gather of whole logits is not called from
    here: on some GPUs it hands out one shared buffer and relies on a collective between two calls."""

    NAMES = ("input_ids", "hidden_states", "lm_head", "logits_metadata", "aux_hidden_states")

    def __init__(self, layers: LayerHooks | None) -> None:
        """`layers` holds the aux states of a model that does not hand them over itself; `softcaps` is what SGLang's
        logits function leaves to us, for each processor."""
        self.rows: Tensor | None = None  # on the engine's device
        self.keep_logits = False
        self.softcaps = dict[Any, float | None]()
        self._softcap: float | None = None
        self._layers = layers
        self.forget()

    def capped(self, logits: Tensor) -> Tensor:
        return teacher.capped(logits, self._softcap)

    def forget(self) -> None:
        """Frees the last pass's states."""
        self.aux = self.last = self.top1 = self.lse = self.logits = torch.empty(0)

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._softcap = self.softcaps.get(module)
        if self.rows is None:
            return
        seen = dict(zip(self.NAMES, args, strict=False)) | kwargs
        hidden: Tensor = seen["hidden_states"]
        aux = self._layers.states() if self._layers else seen["aux_hidden_states"]
        self.aux = aux if isinstance(aux, Tensor) else torch.cat(list(aux), dim=-1)
        self.last = hidden[self.rows]
        shard, group = Shard(0, module.config.vocab_size), None
        of_head = getattr(seen["lm_head"], "shard_indices", None)  # None: each rank has the whole head (Gemma 3)
        if module.do_tensor_parallel_all_gather and of_head:
            shard = Shard(of_head.org_vocab_start_index, of_head.num_org_elements)
            group = sgl.get_tp_group().device_group
        softcap = self._softcap or module.final_logit_softcapping
        found, kept = [self.last.new_empty(0, 3, dtype=torch.float64)], []
        for piece_nH in self.last.split(max(1, HEAD_LOGITS // module.config.vocab_size)):
            logits_nW = module._compute_lm_head(piece_nH, seen["lm_head"])  # of this rank's shard, in the head's dtype
            if module.logit_scale is not None:
                logits_nW.mul_(module.logit_scale)
            found.append(teacher.shard_columns(logits_nW, shard, softcap))
            if self.keep_logits:
                logits_nV = teacher.gathered(logits_nW, group)[:, : module.config.vocab_size]
                kept.append(teacher.capped(logits_nV.float(), softcap))
        self.top1, self.lse = teacher.merged(torch.cat(found), group)
        if self.keep_logits:
            self.logits = torch.cat(kept)


@contextlib.contextmanager
def _default_group(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Make `group` the default process group while SGLang builds its own inside it.

    SGLang insists that the world is exactly its tensor-parallel ranks. Each replica of a larger world looks like a
    whole world to it this way; afterwards the real world is back for DeepSpeed. One private torch call."""
    world = c10d.GroupMember.WORLD
    if group is None:
        yield
        return
    c10d._update_default_pg(group)
    try:
        yield
    finally:
        c10d._update_default_pg(world)


def _context_length(info: TargetInfo, tokens_per_batch: int) -> int | None:
    """SGLang's table of places takes 4 bytes for each of its tokens and each request: 10 GB at 10 million. None: as
    the target's config has it, which may not be exceeded."""
    own = info.config.get("max_position_embeddings")
    return tokens_per_batch if isinstance(own, int) and tokens_per_batch < own else None


def server_args(
    info: TargetInfo,
    ranks: Ranks,
    dtype: torch.dtype,
    tokens_per_batch: int,
    mem_frac: float,
    trust_remote_code: bool = False,
    whole_pool: bool = False,
) -> Any:
    """SGLang's settings for passes whose states are captured; SGLang resolves what is left open."""
    on_cpu = ranks.device.type == "cpu"
    return sgl.ServerArgs(
        model_path=info.path,
        dtype=hardware.name(dtype),
        device=ranks.device.type,
        # SGLang's choice on a GPU may be a kernel for 16 bits only, whatever the dtype (fa3 on Hopper).
        attention_backend="torch_native" if on_cpu else "triton" if dtype == torch.float32 else None,
        tp_size=ranks.tp_size,
        mem_fraction_static=mem_frac,
        context_length=_context_length(info, tokens_per_batch),
        # The KV pool: one batch, for nothing is kept between batches; None: what mem_frac leaves.
        max_total_tokens=None if whole_pool else tokens_per_batch + MAX_EXAMPLES,
        max_running_requests=MAX_EXAMPLES,
        page_size=1,
        chunked_prefill_size=-1,  # a chunked prefill would split a sequence over two forwards
        disable_radix_cache=True,  # a prefix hit would return only the uncached suffix
        disable_hybrid_swa_memory=True,  # the pool of sliding-window layers is as large as the other
        disable_cuda_graph=True,
        disable_overlap_schedule=True,
        disable_custom_all_reduce=True,
        enforce_disable_flashinfer_allreduce_fusion=True,  # a layer's state would be a partial sum
        skip_tokenizer_init=True,
        sampling_backend="pytorch",
        grammar_backend="none",
        log_level="error",
        trust_remote_code=trust_remote_code,
    )


def _load_runner(
    info: TargetInfo,
    ranks: Ranks,
    dtype: torch.dtype,
    tokens_per_batch: int,
    mem_frac: float,
    trust_remote_code: bool,
    whole_pool: bool = False,
) -> Any:
    on_cpu = ranks.device.type == "cpu"
    if on_cpu:
        # SGLang compiles a few pointwise operations. torch's cache of compiled graphs (a folder in /tmp that outlives
        # the process) does not tell AVX-512 from AVX2, so that a graph made for one CPU gives wrong token ids or a
        # crash on another: https://docs.pytorch.org/docs/stable/generated/torch.compiler.set_stance.html
        torch.compiler.set_stance("force_eager")
    if on_cpu and ranks.tp_size > 1:  # more ranks than NUMA nodes: SGLang wants to be told each rank's cores
        cores = [str(core) for core in sorted(os.sched_getaffinity(0))]
        share = max(1, len(cores) // ranks.tp_size)
        groups = [cores[r * share % len(cores) :][:share] for r in range(ranks.tp_size)]
        os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", "|".join(",".join(group) for group in groups))
    args = server_args(info, ranks, dtype, tokens_per_batch, mem_frac, trust_remote_code, whole_pool)
    if hasattr(args, "resolve"):
        args.resolve()
    ports = sgl.PortArgs.init_new(args)
    sgl.one_batch.get_tokenizer = lambda *args, **kwargs: None
    gpu = ranks.device.index or 0
    with _default_group(ranks.tp_group):
        world_rank = sgl.spawn_world_rank(args, tp_rank=ranks.tp_rank, pp_rank=0)
        sgl.publish(args, role="scheduler", ranks=sgl.SpawnRanks(world_rank=world_rank, gpu_id=gpu))
        for initialize in (  # as its scheduler does; without them quantised MoE weights are widened to bf16
            sgl.initialize_moe_config,
            sgl.initialize_fp8_gemm_config,
            sgl.initialize_fp4_gemm_config,
            sgl.initialize_bf16_gemm_config,
        ):
            initialize()
        threads = torch.get_num_threads()
        bench_runner, _ = sgl.one_batch.load_model(args, ports, gpu, ranks.tp_rank)
        torch.set_num_threads(threads)  # on a GPU SGLang leaves one, for all later work on the host
    return bench_runner.torch_runner
