"""Answers by the target itself."""

from __future__ import annotations

import json

from specforge import launch
from specforge.config import RegenerateSettings
from specforge.console import advance, is_main_rank, progress, say
from specforge.data import formats
from specforge.data import regenerate as regeneration
from specforge.data.tokenize import ChatTokenizer
from specforge.errors import ConfigError, DataError
from specforge.files import replacing
from specforge.pipeline.shared import leave, start_engine
from specforge.records import Conversation
from specforge.target import engine as engines
from specforge.target import weights


def regenerate(settings: RegenerateSettings) -> int | None:
    report = formats.ReadReport()
    if settings.output.resolve() == settings.prompts.resolve():
        raise ConfigError(
            "the answers would be written over the prompts",
            where=f"--output {settings.output}",
            fix="choose another file",
        )
    asked = formats.read_conversations(settings.prompts, report, needed="user")
    tokenizer = ChatTokenizer(settings.model_path, trust_remote_code=settings.trust_remote_code)
    info = weights.describe(settings.model_path, settings.trust_remote_code)
    engines.check_tp(info, settings.tp_size, settings.engine)
    code = launch.start_ranks(settings.tp_size, replicas=False)
    if code is not None:
        return code
    ranks = launch.join(settings.tp_size)
    engine = start_engine(settings, info, ranks, settings.output.parent)
    kept = list[Conversation]()
    with progress("answering", len(asked), "prompts") as bar:
        for batch in regeneration.answer(engine, tokenizer, asked, settings.max_new_tokens, settings.batch_size):
            kept += [conversation for conversation in batch if conversation is not None]
            advance(bar, len(batch))
    if not kept:
        raise DataError(
            f"none of {len(asked)} answers ended within {settings.max_new_tokens} tokens",
            where=f"--max-new-tokens {settings.max_new_tokens}",
            fix="raise it",
        )
    if is_main_rank():
        with replacing(settings.output) as file:
            file.writelines(json.dumps(formats.to_row(one), ensure_ascii=False) + "\n" for one in kept)
    say(f"{len(kept)} of {len(asked)} answers ended within {settings.max_new_tokens} tokens and were kept")
    say(f"next: specforge prepare-data --dataset {settings.output} --model-path {settings.model_path}")
    leave(ranks)
    return None
