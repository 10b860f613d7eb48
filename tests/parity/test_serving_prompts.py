"""Rows against what SGLang's server feeds: its own code for building the prompt of a chat, for random conversations of
each family; and a server on this machine, which tells the tokens of its prompts."""

from __future__ import annotations

import datetime
from types import SimpleNamespace

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest
from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
from sglang.srt.parser.jinja_template_utils import detect_jinja_template_content_format
from sglang.srt.parser.template_manager import TemplateManager
from sglang.srt.utils.hf_transformers.tokenizer import get_tokenizer
from transformers.utils import chat_template_utils

from specforge.config import DataSettings
from specforge.data.formats import parse
from specforge.data.serving_view import View
from specforge.data.tokenize import DATE, ChatTokenizer
from tests import tiny
from tests.e2e.servers import free_port, server
from tests.families import FAMILIES, TOOL, call, make, result

RULES = DataSettings(max_length=100_000)
# What SGLang hands these templates instead of text and null is more than they can take: it refuses the request.
TAKES_NO_CALLS_OF_SGLANG = {"deepseek-v3", "deepseek-r1"}

texts = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
        st.sampled_from(
            ["the cat", " ", "\n", "\n\n", "\n\n\n", "  two", "👩‍👩‍👧", "<b>", "1,000.5", "\t", "def f():\n    "]
        ),
    ),
    max_size=5,
).map("".join)
words = texts.filter(lambda text: bool(text.strip()))
thoughts = st.one_of(st.just(""), words.map(str.strip))


@st.composite
def conversations(draw):
    """A row: perhaps a system prompt, exchanges with or without thoughts, some of them with a call and its result."""
    messages = [{"role": "system", "content": draw(words)}] if draw(st.booleans()) else []
    calls = draw(st.booleans())
    number = 0
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(words)})
        if calls and draw(st.booleans()):
            arguments = {"town": draw(words), "days": draw(st.integers(0, 9))}
            one = call(number, **arguments) | {"id": f"functions.get_weather:{number}"}
            messages += [answer("", draw(thoughts)) | {"tool_calls": [one]}]
            messages += [result(number, draw(words)) | {"tool_call_id": one["id"]}]
            number += 1
        messages.append(answer(draw(words), draw(thoughts)))
    return {"messages": messages} | ({"tools": [TOOL]} if calls else {})


def answer(text, thought):
    return {"role": "assistant", "content": text} | ({"reasoning_content": thought} if thought else {})


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    """{family: (our tokenizer, SGLang's building of prompts over the same folder)}"""
    found = {}
    for name in FAMILIES:
        folder = tmp_path_factory.mktemp("family")
        found[name] = make(name, folder), sglang_prompts(str(folder))
    return found


def sglang_prompts(folder: str) -> OpenAIServingChat:
    """The part of SGLang's chat endpoint that makes tokens of a request, without the engine behind it."""
    tokenizer = get_tokenizer(folder)
    templates = TemplateManager()
    templates._jinja_template_content_format = detect_jinja_template_content_format(tokenizer.chat_template)
    serving = object.__new__(OpenAIServingChat)
    serving.tokenizer_manager = SimpleNamespace(tokenizer=tokenizer)
    serving.template_manager, serving.chat_encoding_spec = templates, None
    serving._tokenizer_auto_adds_specials = len(tokenizer.encode("")) > 0
    serving._prompt_text_round_trip_is_lossy = False
    return serving


def served(serving: OpenAIServingChat, row, count, kwargs) -> list[int]:
    """SGLang's prompt for the first `count` turns."""
    request = ChatCompletionRequest(
        model="m", messages=row["messages"][:count], tools=row.get("tools"), chat_template_kwargs=dict(kwargs) or None
    )
    tools = [tool.model_dump() for tool in request.tools] if request.tools else None
    return list(serving._apply_jinja_template(request, tools, False).prompt_ids)


class Fixed(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return DATE


@pytest.mark.parametrize("family", FAMILIES)
@given(row=conversations())
@settings(max_examples=40, deadline=None)
def test_each_turn_is_what_sglang_feeds_and_what_the_target_writes(targets, family, row):
    chat, serving = targets[family]
    calls = "tools" in row
    if family in TAKES_NO_CALLS_OF_SGLANG and calls:
        return
    conversation = parse(row, "x")[1]
    view = chat._view(conversation, "all-turns")
    if not isinstance(view, View):
        assert isinstance(view, str)
        return
    rows = [ids_T.tolist() for ids_T, _ in chat.examples([conversation], RULES)[0].masked]
    for turn in view.turns:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chat_template_utils, "datetime", Fixed)
            prompt = served(serving, row, turn.before, turn.kwargs)
        written = chat.backend.encode(turn.completion, add_special_tokens=False).ids
        wanted = [*prompt, *written]
        # a stop alone is nothing to predict
        assert any(ids[: len(wanted)] == wanted for ids in rows) or len(written) == 1


def test_a_server_feeds_the_prompts_that_were_prepared(tmp_path):
    """50 conversations through /v1/chat/completions of SGLang's own server: the tokens of its prompts are the rows' up
    to what is supervised."""
    tiny.make_target(tmp_path / "target")
    chat = ChatTokenizer(str(tmp_path / "target"))
    port = free_port()
    with server(tmp_path, port):
        for row in tiny.conversations(50, seed=16, turns=2):
            [found] = chat.examples([parse(row, "x")[1]], RULES)
            [(ids_T, mask_T)] = found.masked
            starts = [at for at in range(1, len(mask_T)) if mask_T[at] and not mask_T[at - 1]]
            for start, count in zip(starts, (1, 3), strict=True):
                asked = {"model": "target", "messages": row["conversations"][:count], "max_tokens": 1}
                reply = httpx.post(
                    f"http://127.0.0.1:{port}/v1/chat/completions",
                    json=asked | {"return_prompt_token_ids": True, "temperature": 0},
                    timeout=60,
                ).json()
                assert reply["choices"][0]["prompt_token_ids"] == ids_T[:start].tolist()
