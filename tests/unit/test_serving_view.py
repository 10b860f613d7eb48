"""What public chat templates and public data do that a mask can get wrong: one small template and row for each."""

# ruff: noqa: E501  # templates

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import GenerationConfig

from specforge.config import DataSettings
from specforge.data import serving_view
from specforge.data.formats import OTHER_PARTS, parse, to_row
from specforge.data.serving_view import CALLLESS, HIDDEN, OPENED, STOPS, THOUGHTLESS, TWICE, UNOPENED, shared
from specforge.data.tokenize import CHANGED, FUSED, ChatTokenizer
from specforge.errors import ConfigError
from tests import tiny
from tests.families import PIECES
from tests.rows import rows_of, shown

THINK = ("<think>", "</think>")
OPEN = "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
TURN = "{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}"
ALL = "{%- for m in messages -%}"
PLAIN = ALL + TURN + "{%- endfor -%}" + OPEN
HEAD = "<|im_start|>assistant\n"


@dataclass(frozen=True)
class Target:
    template: str = PLAIN
    special: tuple[str, ...] = ()  # beside ChatML's
    plain: tuple[str, ...] = THINK
    eos: str = "<|im_end|>"
    ends: tuple[str, ...] = ()  # that the configurations name; the eos without any
    settings: dict[str, str] = field(default_factory=dict)

    def make(self, folder: Path) -> ChatTokenizer:
        newlines = ["two cats.\n\none dog.\n\n\n"] * 50
        own = tiny.tokenizer(
            *self.special,
            plain=self.plain,
            more_text=newlines,
            split=PIECES,
            eos_token=self.eos,
            chat_template=self.template,
            **self.settings,
        )
        own.save_pretrained(folder)
        ends = own.convert_tokens_to_ids(list(self.ends or (self.eos,)))
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": ends}))
        return ChatTokenizer(str(folder))


def user(text: str = "Cats?") -> dict[str, object]:
    return {"role": "user", "content": text}


def says(text: object, **more: object) -> dict[str, object]:
    return {"role": "assistant", "content": text, **more}


def asks(text: str = "Cats?") -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n"


def call(arguments: object, name: str = "weather") -> dict[str, object]:
    return {"id": "abc123def", "type": "function", "function": {"name": name, "arguments": arguments}}


def seen(target: Target, folder: Path, row: dict[str, object], **rules: object) -> list[str] | str:
    """The rows that a row of data becomes, supervised tokens in brackets, or the reason why there is none."""
    found = parse(row, "x", bool(rules.get("is_preformatted")))
    if isinstance(found, str):
        return f"bad: {found}"
    chat = target.make(folder)
    rows = rows_of(chat, found[1], **rules)
    return rows if isinstance(rows, str) else [shown(chat, masked) for masked in rows]


def messages(*turns: dict[str, object], **more: object) -> dict[str, object]:
    return {"messages": list(turns), **more}


# Ends of turns

TWO_ENDS = (
    "{%- for m in messages -%}<|turn|>{{ m.role }}<|text|>{{ m.content }}"
    "{% if m.role == 'assistant' %}<|done|>{% endif %}<|stop|>{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|turn|>assistant<|text|>{%- endif -%}"
)
NEXT_ENDS = (  # as GLM: the next turn's header ends a turn
    ALL + "{%- if m.role == 'assistant' -%}{{- '<|assistant|>\\n<think>' + (m.reasoning_content or '') + '</think>\\n'"
    " + m.content -}}{%- else -%}{{- '<|' + m.role + '|>' + m.content -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
NEXT = Target(
    NEXT_ENDS, ("<|user|>", "<|assistant|>", "<|tool|>"), THINK, "<|endoftext|>", ("<|endoftext|>", "<|user|>")
)
UNCLOSED = (
    ALL + "{{- '\\n\\n### ' + m.role + ':\\n' + m.content -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '\\n\\n### assistant:\\n' -}}{%- endif -%}"
)


@pytest.mark.parametrize("done_is_special", [True, False])
def test_a_turn_that_two_tokens_end_goes_up_to_the_one_that_stops_the_server(tmp_path, done_is_special):
    special, done = ("<|turn|>", "<|text|>", "<|stop|>"), ("<|done|>",)
    target = Target(
        TWO_ENDS, special + done * done_is_special, () if done_is_special else done, "<|stop|>", ("<|stop|>",)
    )
    row = messages(user(), says("Two."))
    assert seen(target, tmp_path, row) == [
        "<|turn|>user<|text|>Cats?<|stop|><|turn|>assistant<|text|>⟦Two.<|done|><|stop|>⟧"
    ]


def test_an_end_of_turn_that_is_not_special_and_not_the_eos(tmp_path):
    target = Target(
        PLAIN.replace("im_end", "ender"), (), ("<|ender|>",), "<|endoftext|>", ("<|endoftext|>", "<|ender|>")
    )
    assert seen(target, tmp_path, messages(user(), says("Two.")))[0].endswith("⟦Two.<|ender|>⟧\n")
    chat = ChatTokenizer(str(tmp_path))
    ender = chat.tokenizer.convert_tokens_to_ids("<|ender|>")
    assert ender in chat.stop_ids()
    assert ender in chat.special_ids()


def test_ends_that_only_generation_config_names(tmp_path):
    target = Target(NEXT_ENDS, NEXT.special, THINK, "<|endoftext|>")
    target.make(tmp_path)
    ends = ChatTokenizer(str(tmp_path)).tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|user|>", "<|tool|>"])
    GenerationConfig(eos_token_id=ends).save_pretrained(tmp_path)
    assert ChatTokenizer(str(tmp_path)).stop_ids() == sorted(ends)


def test_a_last_turn_that_the_template_leaves_open_gets_the_stop_of_the_next_header(tmp_path):
    assert seen(NEXT, tmp_path, messages(user(), says("Two."))) == [
        "<|user|>Cats?<|assistant|>⟦\n<think></think>\nTwo.<|user|>⟧"
    ]


def test_a_turn_that_nothing_ends_gets_the_eos(tmp_path):
    found = seen(Target(UNCLOSED), tmp_path, messages(user(), says("Two."), user("Dogs?"), says("One.")))
    assert found == [
        "\n\n### user:\nCats?\n\n### assistant:\n⟦Two.<|im_end|>⟧",
        "\n\n### user:\nCats?\n\n### assistant:\nTwo.\n\n### user:\nDogs?\n\n### assistant:\n⟦One.<|im_end|>⟧",
    ]


def test_the_text_of_a_stop_inside_a_turn(tmp_path):
    assert seen(Target(), tmp_path, messages(user(), says("Two <|im_end|> cats."))) == STOPS


# The hand-over


@pytest.mark.parametrize("inside", ["'<|im_start|>assistant\\n' + m.content + '<|im_end|>\\n'", "m.content", "''"])
def test_generation_blocks_are_not_trusted(tmp_path, inside):
    """They hold the header in some public templates, and leave out the end in others."""
    rest = {"m.content": "{{- '<|im_end|>\\n' -}}", "''": "{{- m.content + '<|im_end|>\\n' -}}"}
    header = "" if "im_start" in inside else "{{- '<|im_start|>assistant\\n' -}}"
    template = (
        f"{ALL}{{%- if m.role == 'assistant' -%}}{header}{{% generation %}}{{{{- {inside} -}}}}{{% endgeneration %}}"
        f"{rest.get(inside, '')}{{%- else -%}}{TURN}{{%- endif -%}}{{%- endfor -%}}{OPEN}"
    )
    assert seen(Target(template), tmp_path, messages(user(), says("Two."))) == [asks() + HEAD + "⟦Two.<|im_end|>⟧\n"]


def test_a_system_prompt_that_only_the_last_question_gets(tmp_path):
    """Mistral-Nemo: in a render of the whole conversation, whose last turn is the answer, it is nowhere."""
    template = (
        "{%- if messages[0].role == 'system' -%}{%- set s = messages[0].content -%}{%- set messages = messages[1:] -%}"
        "{%- endif -%}{{- bos_token -}}{%- for m in messages -%}{%- if m.role == 'user' -%}"
        "{{- '[INST]' + (s + '\\n\\n' if loop.last and s is defined else '') + m.content + '[/INST]' -}}"
        "{%- else -%}{{- m.content + '</s>' -}}{%- endif -%}{%- endfor -%}"
    )
    target = Target(template, ("<s>", "</s>", "[INST]", "[/INST]"), (), "</s>", settings={"bos_token": "<s>"})
    system = {"role": "system", "content": "In French."}
    assert seen(target, tmp_path, messages(system, user(), says("Deux."), user("Dogs?"), says("Un."))) == [
        "<s>[INST]In French.\n\nCats?[/INST]⟦Deux.</s>⟧",
        "<s>[INST]Cats?[/INST]Deux.</s>[INST]In French.\n\nDogs?[/INST]⟦Un.</s>⟧",
    ]


def test_tokens_that_are_others_inside_a_later_prompt_begin_a_row(tmp_path):
    """The prompt ends in a newline, the answer begins with one: served apart, one token where they stand together."""
    chat = Target().make(tmp_path)
    row = parse(messages(user(), says("\nTwo."), user("Dogs?"), says("One.")), "x")[1]
    [found] = chat.examples([row], DataSettings(max_length=512))
    assert dict(found.more) == {FUSED: 1}
    assert [shown(chat, masked) for masked in found.masked] == [
        asks() + HEAD + "⟦\nTwo.<|im_end|>⟧\n",
        asks() + HEAD + "\nTwo.<|im_end|>\n" + asks("Dogs?") + HEAD + "⟦One.<|im_end|>⟧\n",
    ]
    first, second = (masked[0].tolist() for masked in found.masked)
    newlines = chat.backend.encode("\n\n", add_special_tokens=False).ids
    assert len(newlines) == 1
    assert newlines[0] in second
    assert newlines[0] not in first


# Thoughts

SPLIT = (
    "{%- set c = m.content -%}{%- set r = m.reasoning_content or '' -%}{%- if not r and '</think>' in c -%}"
    "{%- set r = c.split('</think>')[0].split('<think>')[-1].strip() -%}"
    "{%- set c = c.split('</think>')[-1].lstrip('\\n') -%}{%- endif -%}"
)
LAST = (
    "{%- set at = namespace(user=-1) -%}{%- for m in messages -%}{%- if m.role == 'user' -%}"
    "{%- set at.user = loop.index0 -%}{%- endif -%}{%- endfor -%}"
)
QWEN35 = (
    LAST + ALL + "{{- '<|im_start|>' + m.role + '\\n' -}}{%- if m.role == 'assistant' -%}" + SPLIT
    + "{%- if loop.index0 > at.user -%}{{- '<think>\\n' + r + '\\n</think>\\n\\n' -}}{%- endif -%}{{- c -}}"
    "{%- else -%}{{- m.content -}}{%- endif -%}{{- '<|im_end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n<think>\\n' -}}"
    "{{- '\\n</think>\\n\\n' if enable_thinking is defined and not enable_thinking else '' -}}{%- endif -%}"
)  # fmt: skip
NEMOTRON = (
    ALL + "{{- '<|im_start|>' + m.role + '\\n' -}}{%- if m.role == 'assistant' -%}"
    "{{- m.content if '</think>' in m.content else '<think></think>' + m.content -}}"
    "{%- for c in m.tool_calls or [] -%}{{- '<call>' + c.function.name + ' ' + (c.function.arguments | tojson) + '</call>' -}}"
    "{%- endfor -%}{%- else -%}{{- m.content -}}{%- endif -%}{{- '<|im_end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}"
    "{{- '<think></think>' if enable_thinking is defined and not enable_thinking else '<think>\\n' -}}{%- endif -%}"
)
OPENS = ALL + TURN + "{%- endfor -%}" + OPEN.replace("assistant\\n", "assistant\\n<think>\\n")
EMPTY = (
    ALL
    + "{{- '<|im_start|>' + m.role + '\\n' -}}{%- if m.role == 'assistant' -%}{{- '<think></think>' -}}{%- endif -%}"
    "{{- m.content + '<|im_end|>\\n' -}}{%- endfor -%}" + OPEN
)
STRIPS = OPENS.replace("m.content", "m.content.split('</think>')[-1]")
KEY = ALL.replace(
    "-%}", "-%}{{- '<|im_start|>' + m.role + '\\n' + ('<think>' + m.KEY + '</think>' if m.KEY else '') -}}"
)
KEY += "{{- m.content + '<|im_end|>\\n' -}}{%- endfor -%}" + OPEN
WRITTEN = "I count.\n</think>\n\nTwo."  # what a target writes whose prompt opens the thought
INLINE = "<think>\nI count.\n</think>\n\nTwo."
FILLED = [asks() + HEAD + "⟦<think>I count.</think>Two.<|im_end|>⟧\n"]  # in place of the template's empty thought
# Nemotron Nano 2: the history of the last turn is opened, too
OPENS_TOO = OPENS.replace("m.role + '\\n'", "m.role + ('\\n<think>\\n' if m.role == 'assistant' else '\\n')")
STRIPS_UNOPENED = STRIPS.replace("assistant\\n<think>\\n", "assistant\\n")
CLOSES_TWICE = KEY.replace("KEY", "reasoning_content").replace("</think>'", "</think></think>'")
OPENED_ROW = asks() + HEAD + "<think>\n⟦I count.\n</think>\n\nTwo.<|im_end|>⟧\n"


@pytest.mark.parametrize(
    ("template", "turn", "right"),
    [
        (QWEN35, says("Two."), [asks() + HEAD + "<think>\n\n</think>\n\n⟦Two.<|im_end|>⟧\n"]),
        (QWEN35, says(INLINE), [OPENED_ROW]),
        (QWEN35, says("Two.", reasoning_content="I count."), [OPENED_ROW]),
        (NEMOTRON, says("Two."), [asks() + HEAD + "<think></think>⟦Two.<|im_end|>⟧\n"]),
        (NEMOTRON, says(WRITTEN), [OPENED_ROW]),
        (NEMOTRON, says(INLINE), [OPENED_ROW]),
        (OPENS, says(WRITTEN), [OPENED_ROW]),
        (OPENS, says("Two."), OPENED),
        (STRIPS, says(WRITTEN), [OPENED_ROW]),
        (STRIPS, says(INLINE), [OPENED_ROW]),
        (STRIPS, says("Two.", reasoning_content="I count."), THOUGHTLESS),
        (EMPTY, says("Two."), [asks() + HEAD + "⟦<think></think>Two.<|im_end|>⟧\n"]),
        (EMPTY, says("Two.", reasoning_content="I count."), FILLED),
        (EMPTY, says("<think>I count.</think>Two."), FILLED),
        (EMPTY, says(WRITTEN), FILLED),
        (OPENS_TOO, says(INLINE), [OPENED_ROW]),
        (OPENS_TOO, says(WRITTEN), [OPENED_ROW]),
        (CLOSES_TWICE, says("Two.", reasoning_content="I count."), TWICE),
        (STRIPS_UNOPENED, says(INLINE), [asks() + HEAD + "⟦<think>\nI count.\n</think>\n\nTwo.<|im_end|>⟧\n"]),
        (STRIPS_UNOPENED, says(WRITTEN), THOUGHTLESS),
        (PLAIN, says(WRITTEN), UNOPENED),
        (PLAIN, says("Two.", reasoning_content="I count."), THOUGHTLESS),
    ],
)
def test_thoughts_and_prompts_that_open_them(tmp_path, template, turn, right):
    assert seen(Target(template), tmp_path, messages(user(), turn)) == right


@pytest.mark.parametrize("read", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize("given", ["reasoning_content", "thinking", "reasoning", "inline", "null", "part"])
def test_a_thought_reaches_the_key_that_the_template_reads(tmp_path, read, given):
    turn = says("Two.", **{given: "I count."})
    turn = says("<think>I count.</think>Two.") if given == "inline" else turn
    turn = says("Two.", reasoning_content=None, thinking="", reasoning="I count.") if given == "null" else turn
    if given == "part":
        turn = says(
            [{"type": "thinking", "thinking": [{"type": "text", "text": "I count."}]}, {"type": "text", "text": "Two."}]
        )
    target = Target(KEY.replace("KEY", read), plain=() if given == "inline" else THINK)
    assert seen(target, tmp_path, messages(user(), turn)) == [
        asks() + HEAD + "⟦<think>I count.</think>Two.<|im_end|>⟧\n"
    ]


def test_thoughts_that_a_template_takes_as_parts_only(tmp_path):
    template = (
        "{{- '<s>' -}}{%- for m in messages -%}{%- if m.role == 'user' -%}{{- '[INST]' + m.content + '[/INST]' -}}"
        "{%- else -%}{%- if m.content is string -%}{{- m.content -}}{%- else -%}{%- for p in m.content -%}"
        "{{- '[THINK]' + p.thinking + '[/THINK]' if p.type == 'thinking' else p.text -}}{%- endfor -%}{%- endif -%}"
        "{{- '</s>' -}}{%- endif -%}{%- endfor -%}"
    )
    target = Target(template, ("<s>", "</s>", "[INST]", "[/INST]", "[THINK]", "[/THINK]"), (), "</s>")
    for turn in (
        says("Two.", reasoning_content="I see."),
        says([{"type": "thinking", "thinking": "I see."}, {"type": "text", "text": "Two."}]),
    ):
        assert seen(target, tmp_path, messages(user(), turn)) == [
            "<s>[INST]Cats?[/INST]⟦[THINK]I see.[/THINK]Two.</s>⟧"
        ]


def test_a_call_whose_thought_goes_as_soon_as_the_answer_is_there(tmp_path):
    """Kimi-K2-Thinking: thoughts stay behind the last answer only. So the render with an answer has neither its thought
    nor those of the calls before it, which the prompt of the answer has."""
    template = (
        "{%- set at = namespace(answer=-1) -%}{%- for m in messages -%}{%- if m.role == 'assistant' and not m.tool_calls -%}"
        "{%- set at.answer = loop.index0 -%}{%- endif -%}{%- endfor -%}"
        + ALL
        + "{{- '<|im_start|>' + m.role + '\\n' -}}{%- if m.role == 'assistant' -%}"
        "{{- '<think>' + (m.reasoning_content if loop.index0 > at.answer and m.reasoning_content else '') + '</think>' -}}{%- endif -%}"
        "{{- m.content -}}{%- for c in m.tool_calls or [] -%}{{- '<call>' + (c.function | tojson) + '</call>' -}}{%- endfor -%}"
        "{{- '<|im_end|>\\n' -}}{%- endfor -%}" + OPEN
    )
    asked = says("", reasoning_content="I look.", tool_calls=[call({"city": "Linz"})])
    row = messages(user(), asked, RESULT, says("Sun.", reasoning_content="It is dry."))
    called = '<think>I look.</think><call>{"name": "weather", "arguments": {"city": "Linz"}}</call><|im_end|>'
    assert seen(Target(template), tmp_path, row) == [
        asks()
        + HEAD
        + f"⟦{called}⟧\n<|im_start|>tool\nsun<|im_end|>\n"
        + HEAD
        + "⟦<think>It is dry.</think>Sun.<|im_end|>⟧\n"
    ]


def test_earlier_turns_that_lose_their_thoughts_make_two_rows(tmp_path):
    turns = [
        user(),
        says("Two.", reasoning_content="I count."),
        user("Dogs?"),
        says("One.", reasoning_content="I look."),
    ]
    chat = Target(QWEN35).make(tmp_path)
    [found] = chat.examples([parse(messages(*turns), "x")[1]], DataSettings(max_length=512))
    assert dict(found.more) == {CHANGED: 1}
    assert [shown(chat, masked) for masked in found.masked] == [
        OPENED_ROW,
        asks() + HEAD + "Two.<|im_end|>\n" + asks("Dogs?") + HEAD + "<think>\n⟦I look.\n</think>\n\nOne.<|im_end|>⟧\n",
    ]


def test_arguments_of_the_row_for_the_template(tmp_path):
    template = PLAIN.replace(
        "m.content +",
        "m.content + ('/nothink' if m.role == 'user' and enable_thinking is defined and not enable_thinking else '') +",
    )
    row = messages(user(), says("Two."), chat_template_kwargs={"enable_thinking": False})
    assert seen(Target(template), tmp_path, row) == [asks("Cats?/nothink") + HEAD + "⟦Two.<|im_end|>⟧\n"]
    for bad in ("{", ["a"], {"messages": []}):
        assert seen(Target(), tmp_path, row | {"chat_template_kwargs": bad}).startswith("bad: chat_template_kwargs")


# Calls

CALLS = (
    ALL
    + "{{- '<|im_start|>' + m.role + '\\n' + m.content -}}{%- for c in m.tool_calls or [] -%}{{- '<call>' + c.function.name"
    " + ' ' + ARGUMENTS + '</call>' -}}{%- endfor -%}{{- '<|im_end|>\\n' -}}{%- endfor -%}" + OPEN
)
AS_GIVEN = CALLS.replace(
    "ARGUMENTS", "(c.function.arguments if c.function.arguments is string else c.function.arguments | tojson)"
)
AS_JSON = CALLS.replace("ARGUMENTS", "(c.function.arguments | tojson)")
AS_TEXT = (  # as DeepSeek-V3: calls only beside no content, arguments as text
    ALL
    + "{%- if m.role == 'assistant' and m.content is none -%}{{- '<|im_start|>assistant\\n' -}}{%- for c in m.tool_calls -%}"
    "{{- '<call>' + c.function.name + ' ' + c.function.arguments + '</call>' -}}{%- endfor -%}{{- '<|im_end|>\\n' -}}"
    "{%- else -%}" + TURN + "{%- endif -%}{%- endfor -%}" + OPEN
)
RESULT = {"role": "tool", "content": "sun", "tool_call_id": "abc123def"}
COMPACT = '{"days":1e3,"station":12345678901234567890123}'


@pytest.mark.parametrize("template", [AS_GIVEN, AS_JSON, AS_TEXT])
@pytest.mark.parametrize("arguments", [{"city": "Rome"}, '{"city": "Rome"}'])
@pytest.mark.parametrize("content", ["", None])
def test_calls_in_the_form_that_the_template_takes(tmp_path, template, arguments, content):
    row = messages(user(), says(content, tool_calls=[call(arguments)]), RESULT, says("Sun."))
    assert seen(Target(template), tmp_path, row) == [
        asks() + HEAD + '⟦<call>weather {"city": "Rome"}</call><|im_end|>⟧\n<|im_start|>tool\nsun<|im_end|>\n'
        + HEAD + "⟦Sun.<|im_end|>⟧\n"
    ]  # fmt: skip


def test_arguments_keep_their_digits(tmp_path):
    row = messages(user(), says("", tool_calls=[call(COMPACT)]))
    assert seen(Target(AS_GIVEN), tmp_path, row) == [asks() + HEAD + f"⟦<call>weather {COMPACT}</call><|im_end|>⟧\n"]
    assert seen(Target(AS_JSON), tmp_path, row) == CALLLESS  # 1e3 would become 1000.0
    big = messages(user(), says("", tool_calls=[call({"station": 12345678901234567890123})]))
    assert "12345678901234567890123" in seen(Target(AS_JSON), tmp_path, big)[0]


def test_a_later_prompt_holds_what_a_server_makes_of_the_arguments(tmp_path):
    """It reads text, and hands the object to the template: the next prompt has other spaces than the target wrote."""
    row = messages(user(), says("", tool_calls=[call('{"city":"Rome"}')]), RESULT, says("Sun."))
    first, second = seen(Target(AS_GIVEN), tmp_path, row)
    assert '⟦<call>weather {"city":"Rome"}</call><|im_end|>⟧' in first
    assert '<call>weather {"city": "Rome"}</call><|im_end|>\n' in second


def test_a_call_that_the_template_leaves_out_ends_the_conversation(tmp_path):
    turns = [user(), says("Two."), user("Rain?"), says("", tool_calls=[call({"city": "Rome"})]), RESULT, says("Sun.")]
    chat = Target().make(tmp_path)
    [found] = chat.examples([parse(messages(*turns), "x")[1]], DataSettings(max_length=512))
    assert [shown(chat, masked) for masked in found.masked] == [asks() + HEAD + "⟦Two.<|im_end|>⟧\n"]
    assert dict(found.left_out) == {CALLLESS: 1}
    assert seen(Target(), tmp_path, messages(*turns[2:])) == CALLLESS


def test_calls_of_the_older_api(tmp_path):
    old = says("", function_call={"name": "weather", "arguments": '{"city": "Rome"}'})
    row = messages(user(), old, {"role": "function", "name": "weather", "content": "sun"}, says("Sun."))
    assert seen(Target(), tmp_path, row) == CALLLESS
    assert '⟦<call>weather {"city": "Rome"}</call><|im_end|>⟧' in seen(Target(AS_JSON), tmp_path, row)[0]
    conversation = parse(row, "x")[1]
    assert conversation.messages[1].tool_calls[0]["id"] == conversation.messages[2].tool_call_id


def test_keys_that_only_the_template_knows(tmp_path):
    template = (
        ALL + "{{- '<|im_start|>' + m.role + '\\n' + m.content -}}"
        "{%- if m.role == 'system' -%}{{- ' Functions: ' + m.functions if m.functions else ' No functions.' -}}{%- endif -%}"
        "{%- if m.function_calls -%}{{- '<call>' + m.function_calls + '</call>' -}}{%- endif -%}{{- '<|im_end|>\\n' -}}{%- endfor -%}"
        + OPEN
    )
    row = messages(
        {"role": "system", "content": "OLMo.", "functions": "[weather]"},
        user(),
        says("I look.", function_calls="weather()"),
        {"role": "environment", "content": "sun"},
        says("Sun."),
    )
    [found] = seen(Target(template), tmp_path, row)
    assert "OLMo. Functions: [weather]" in found
    assert "⟦I look.<call>weather()</call><|im_end|>⟧" in found
    assert seen(Target(), tmp_path, row) == CALLLESS


def test_a_template_that_needs_tools(tmp_path):
    template = "{%- for t in tools -%}{{- t.function.name + '\\n' -}}{%- endfor -%}" + PLAIN
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    assert seen(Target(template), tmp_path, messages(user(), says("Two."), tools=tools)) == [
        "weather\n" + asks() + HEAD + "⟦Two.<|im_end|>⟧\n"
    ]
    assert seen(Target(template), tmp_path, messages(user(), says("Two."))).startswith("the template cannot take it")


@pytest.mark.parametrize("form", ["list", "folder"])
def test_rows_with_tools_get_the_template_for_them(tmp_path, form):
    with_tools = "{{- 'Tools: ' + tools[0].function.name + '\\n' -}}" + PLAIN
    Target().make(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    if form == "list":
        named = [{"name": "default", "template": PLAIN}, {"name": "tool_use", "template": with_tools}]
        (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
        file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": named}))
    else:
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(with_tools)
    chat = ChatTokenizer(str(tmp_path))
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    for more, head in (({}, ""), ({"tools": tools}, "Tools: weather\n")):
        [masked] = rows_of(chat, parse(messages(user(), says("Two."), **more), "x")[1])
        assert shown(chat, masked) == head + asks() + HEAD + "⟦Two.<|im_end|>⟧\n"


# Contents and rows


def test_a_template_that_wants_parts(tmp_path):
    template = (
        ALL
        + "{{- m.role + ':' -}}{%- for p in m.content -%}{%- if p['type'] == 'text' -%}{{- ' ' + p['text'] -}}{%- endif -%}"
        "{%- endfor -%}{{- '<|im_end|>\\n' -}}{%- endfor -%}{%- if add_generation_prompt -%}{{- 'assistant:' -}}{%- endif -%}"
    )
    for row in (
        messages(user(), says("Two.")),
        messages(user([{"type": "text", "text": "Cats?"}]), says([{"type": "text", "text": "Two."}])),
    ):
        assert seen(Target(template), tmp_path, row) == ["user: Cats?<|im_end|>\nassistant:⟦ Two.<|im_end|>⟧\n"]


def test_parts_other_than_text_have_a_reason_of_their_own():
    assert parse(messages(user([{"type": "image"}, {"type": "text", "text": "?"}]), says("Two.")), "x") == OTHER_PARTS
    assert parse(messages(user([{"type": "text"}]), says("Two.")), "x") == "a turn that is not only text"


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Dogs?", "output": "One.", "history": [["Cats?", "Two."]]},
        {"instruction": "Dogs?", "output": "One.", "history": [user(), says("Two.")]},
    ],
)
def test_alpacas_history(tmp_path, row):
    assert seen(Target(), tmp_path, row) == [
        asks() + HEAD + "⟦Two.<|im_end|>⟧\n" + asks("Dogs?") + HEAD + "⟦One.<|im_end|>⟧\n"
    ]
    assert seen(Target(), tmp_path, row | {"history": ["Cats?"]}).startswith("bad: a history")


@pytest.mark.parametrize("column", ["reasoning", "thinking", "reasoning_content", "cot"])
def test_a_thought_in_a_column(tmp_path, column):
    row = {"question": "1+1?", column: "I add.", "answer": "2"}
    assert seen(NEXT, tmp_path, row) == ["<|user|>1+1?<|assistant|>⟦\n<think>I add.</think>\n2<|user|>⟧"]


@pytest.mark.parametrize(
    "mark", [{"weight": 0}, {"loss": False}, {"trainable": False}, {"train": False}, {"weight": 0.0}]
)
def test_turns_marked_as_context_are_read_and_not_learned_from(tmp_path, mark):
    right = [asks() + HEAD + "Wrong.<|im_end|>\n" + asks("Really?") + HEAD + "⟦Two.<|im_end|>⟧\n"]
    row = messages(user(), says("Wrong.", **mark), user("Really?"), says("Two."))
    assert seen(Target(), tmp_path, row) == right
    again = to_row(parse(row, "x")[1])
    assert seen(Target(), tmp_path, json.loads(json.dumps(again))) == right
    listed = messages(user(), says("Wrong."), user("Really?"), says("Two."), loss_mask=[0, 0, 0, 1])
    assert seen(Target(), tmp_path, listed) == right
    assert seen(Target(), tmp_path, listed | {"loss_mask": [0, 1]}).startswith("bad: a loss_mask")
    assert (
        "⟦Wrong."
        in seen(Target(), tmp_path, messages(user(), says("Wrong.", weight=1), user("Really?"), says("Two.")))[0]
    )


# Formatted text

HARMONY = (
    ALL
    + "{{- '<|start|>' + m.role + ('<|channel|>final' if m.role == 'assistant' else '') + '<|message|>' + m.content -}}"
    "{{- '<|return|>' if m.role == 'assistant' else '<|end|>' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start|>assistant' -}}{%- endif -%}"
)
MARKS = ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>", "<|call|>")


@pytest.mark.parametrize(
    ("target", "text", "right"),
    [
        (  # special tokens inside a turn are no end
            Target(special=("<|call|>", "<|endcall|>")),
            asks() + HEAD + "I look.<|call|>weather<|endcall|><|im_end|>\n",
            asks() + HEAD + "⟦I look.<|call|>weather<|endcall|><|im_end|>⟧\n",
        ),
        (  # an answer may begin with one
            Target(HARMONY, MARKS, (), "<|return|>"),
            "<|start|>user<|message|>2?<|end|><|start|>assistant<|channel|>final<|message|>4.<|return|>",
            "<|start|>user<|message|>2?<|end|><|start|>assistant⟦<|channel|>final<|message|>4.<|return|>⟧",
        ),
        (  # a turn of the history without the stop is not learned from
            Target(HARMONY, MARKS, (), "<|return|>"),
            "<|start|>user<|message|>2?<|end|><|start|>assistant<|channel|>final<|message|>4.<|end|>"
            "<|start|>user<|message|>3?<|end|><|start|>assistant<|channel|>final<|message|>9.<|return|>",
            "<|start|>user<|message|>2?<|end|><|start|>assistant<|channel|>final<|message|>4.<|end|>"
            "<|start|>user<|message|>3?<|end|><|start|>assistant⟦<|channel|>final<|message|>9.<|return|>⟧",
        ),
        (  # earlier turns have another header than the prompt, which opens a thought
            Target(QWEN35),
            asks()
            + HEAD
            + "Two.<|im_end|>\n"
            + asks("Dogs?")
            + HEAD
            + "<think>\nI look.\n</think>\n\nOne.<|im_end|>\n",
            asks()
            + HEAD
            + "⟦Two.<|im_end|>⟧\n"
            + asks("Dogs?")
            + HEAD
            + "<think>\n⟦I look.\n</think>\n\nOne.<|im_end|>⟧\n",
        ),
    ],
)
def test_formatted_text(tmp_path, target, text, right):
    assert seen(target, tmp_path, {"id": "1", "text": text}, is_preformatted=True) == [right]


# Tokens of the target


@pytest.mark.parametrize("name", ["LlamaTokenizerFast", "GPT2Tokenizer"])
def test_tokenizer_json_counts_whatever_class_is_named(tmp_path, name):
    """transformers 5 puts the class's own pre-tokenizer in the place of the file's."""
    Target().make(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": name}))
    chat = ChatTokenizer(str(tmp_path))
    text = asks("How many cats?\n\nand dogs?") + HEAD
    right = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    turns = messages(user("How many cats?\n\nand dogs?"), says("Two.\n\nOne."))
    [(ids_T, mask_T)] = rows_of(chat, parse(turns, "x")[1])
    assert ids_T[: int(mask_T.argmax())].tolist() == right


def test_ids_above_the_models_rows_are_refused_with_both_numbers(tmp_path):
    Target().make(tmp_path)
    highest = len(ChatTokenizer(str(tmp_path)).tokenizer) - 1
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": highest}))
    with pytest.raises(ConfigError, match=rf"highest id is {highest:,} .* {highest:,} rows"):
        ChatTokenizer(str(tmp_path))


def test_ids_may_have_holes(tmp_path):
    Target().make(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["added_tokens"].append(content["added_tokens"][-1] | {"id": 900, "content": "<extra>"})
    content["model"]["vocab"]["<extra>"] = 900
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    chat = ChatTokenizer(str(tmp_path))
    assert chat.size == 901
    [(ids_T, _)] = rows_of(chat, parse(messages(user(), says("<extra> Two.")), "x")[1])
    assert 900 in ids_T


def test_a_date_is_always_the_same(tmp_path):
    target = Target("{{- strftime_now('%Y-%m-%d %H:%M:%S') + '\\n' -}}" + PLAIN)
    [found] = seen(target, tmp_path, messages(user(), says("Two.")))
    assert found.startswith("2026-01-01 12:00:00\n")
    assert ChatTokenizer(str(tmp_path)).reads_the_clock


@pytest.mark.parametrize(("one", "other", "count"), [("", "", 0), ("a", "b", 0), ("abc", "abd", 2), ("ab", "abc", 2)])
def test_characters_that_two_texts_begin_with(one, other, count):
    assert shared(one, other) == shared(other, one) == count


def test_a_template_that_hides_the_turn(tmp_path):
    assert seen(Target("{{- 'always the same' -}}"), tmp_path, messages(user(), says("Two."))) == HIDDEN


def test_a_long_conversation_ends_in_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(serving_view, "MOST_RENDERED", 50)
    turns = [turn for _ in range(20) for turn in (user(), says("Two."))]
    assert "more turns than can be rendered" in seen(Target(), tmp_path, messages(*turns))
