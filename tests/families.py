"""Chat templates of 26 families of targets, small and of our own making, with the features of the public ones: where
they put system prompts and tools, what they do with thoughts, how they write calls, and who ends a turn."""

# ruff: noqa: E501, C408  # the pieces of templates are easier to read in long lines

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from transformers import GenerationConfig

from specforge.data.tokenize import ChatTokenizer
from tests import tiny


@dataclass(frozen=True)
class Family:
    template: str
    eos: str
    special: tuple[str, ...] = ()  # beside ChatML's
    plain: tuple[str, ...] = ()  # added tokens that are not special
    ends: tuple[str, ...] = ()  # that generation_config.json names
    bos: str = ""


# Pieces of text as most of these targets cut it: a run of newlines is one
PIECES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TAGS = ("<think>", "</think>")
IM = ("<|im_start|>", "<|im_end|>")
JSON_CALL = """'<tool_call>\\n{"name": "' + c.function.name + '", "arguments": ' + (c.function.arguments if c.function.arguments is string else c.function.arguments | tojson) + '}\\n</tool_call>'"""
XML_CALL = (
    "{{- '<tool_call>\\n<function=' + c.function.name + '>\\n' -}}"
    "{%- for k, v in c.function.arguments.items() -%}"
    "{{- '<parameter=' + k + '>\\n' + (v if v is string else v | tojson) + '\\n</parameter>\\n' -}}{%- endfor -%}"
    "{{- '</function>\\n</tool_call>' -}}"
)
LAST_USER = (
    "{%- set at = namespace(user=-1) -%}"
    "{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set at.user = loop.index0 -%}{%- endif -%}{%- endfor -%}"
)
SPLIT_THOUGHT = (  # into r and c
    "{%- set c = m.content or '' -%}{%- set r = '' -%}"
    "{%- if m.reasoning_content is string -%}{%- set r = m.reasoning_content -%}"
    "{%- elif '</think>' in c -%}"
    "{%- set r = c.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}"
    "{%- set c = c.split('</think>')[-1].lstrip('\\n') -%}{%- endif -%}"
)
OFF = "enable_thinking is defined and not enable_thinking"
TOOLS_JSON = "{%- for t in tools -%}{{- '\\n' + (t | tojson) -}}{%- endfor -%}"


def llama(date: str) -> str:
    head = "'<|start_header_id|>' + {} + '<|end_header_id|>\\n\\n'"
    return (
        "{{- bos_token -}}"
        + date
        + "{%- if messages[0].role == 'system' -%}{%- set sys = messages[0].content | trim -%}"
        "{%- set messages = messages[1:] -%}{%- else -%}{%- set sys = '' -%}{%- endif -%}"
        "{{- " + head.format("'system'") + " + ('Environment: ipython\\n' if tools else '')"
        " + 'Today Date: ' + date + '\\n\\n' + sys + '<|eot_id|>' -}}"
        "{%- if tools -%}{%- set first = messages[0].content | trim -%}{%- set messages = messages[1:] -%}"
        "{{- " + head.format("'user'") + " + 'Given the following functions, call one.\\n\\n' -}}"
        "{%- for t in tools -%}{{- t | tojson(indent=4) + '\\n\\n' -}}{%- endfor -%}{{- first + '<|eot_id|>' -}}{%- endif -%}"
        "{%- for m in messages -%}"
        "{%- if m.role == 'tool' -%}{{- " + head.format("'ipython'") + " + (m.content | tojson) + '<|eot_id|>' -}}"
        "{%- elif 'tool_calls' in m -%}"
        "{%- if m.tool_calls | length != 1 -%}{{- raise_exception('only single tool calls at once') -}}{%- endif -%}"
        "{%- set f = m.tool_calls[0].function -%}{{- " + head.format("'assistant'") + " -}}"
        "{{- '{\"name\": \"' + f.name + '\", \"parameters\": ' + (f.arguments | tojson) + '}<|eot_id|>' -}}"
        "{%- else -%}{{- " + head.format("m.role") + " + (m.content | trim) + '<|eot_id|>' -}}{%- endif -%}"
        "{%- endfor -%}{%- if add_generation_prompt -%}{{- " + head.format("'assistant'") + " -}}{%- endif -%}"
    )


def chatml(
    system: str, assistant: str, prompt: str, tool: str = "", before: str = "", end: str = "'<|im_end|>\\n'"
) -> str:
    """`system` writes the head from s and tools; `assistant` what stands between header and end."""
    tool = tool or (
        "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}"
        "{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' -}}"
        "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{- '<|im_end|>\\n' -}}{%- endif -%}"
    )
    return (
        before + "{%- set s = '' -%}{%- if messages[0].role == 'system' -%}{%- set s = messages[0].content -%}"
        "{%- set messages = messages[1:] -%}{%- endif -%}"
        + LAST_USER
        + system
        + "{%- for m in messages -%}{%- if m.role == 'tool' -%}"
        + tool
        + "{%- elif m.role == 'assistant' -%}{{- '<|im_start|>assistant\\n' -}}"
        + assistant
        + "{{- "
        + end
        + " -}}{%- else -%}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}" + prompt + "{%- endif -%}"
    )


def head(default: str = "", tools: str = "'\\n\\n# Tools\\n<tools>'") -> str:
    return (
        "{%- set s = s or '"
        + default
        + "' -%}{%- if tools -%}{{- '<|im_start|>system\\n' + s + "
        + tools
        + " -}}"
        + TOOLS_JSON
        + "{{- '\\n</tools><|im_end|>\\n' -}}{%- elif s -%}{{- '<|im_start|>system\\n' + s + '<|im_end|>\\n' -}}{%- endif -%}"
    )


EACH_CALL = "{%- for c in m.tool_calls or [] -%}{%- if m.content or not loop.first -%}{{- '\\n' -}}{%- endif -%}"
JSON_CALLS = EACH_CALL + "{{- " + JSON_CALL + " -}}{%- endfor -%}"
XML_CALLS = EACH_CALL + XML_CALL + "{%- endfor -%}"
QWEN3 = (
    SPLIT_THOUGHT
    + "{%- if loop.index0 > at.user and (loop.last or r) -%}{{- '<think>\n' + r + '\n</think>\n\n' + c -}}"
    "{%- else -%}{{- c -}}{%- endif -%}" + JSON_CALLS
)
QWEN35 = (
    SPLIT_THOUGHT
    + "{%- if loop.index0 > at.user -%}{{- '<think>\\n' + r + '\\n</think>\\n\\n' + c -}}{%- else -%}{{- c -}}{%- endif -%}"
    + XML_CALLS
)


def glm(seven: bool) -> str:
    line = "''" if seven else "'\\n'"
    shown = "'<think>' + r + '</think>'" if seven else "'\\n<think>' + r + '</think>'"
    empty = "'</think>'" if seven else "'\\n<think></think>'"
    call = (
        "{{- " + line + " + '<tool_call>' + c.function.name + " + line + " -}}"
        "{%- for k, v in c.function.arguments.items() -%}{{- '<arg_key>' + k + '</arg_key>' + "
        + line
        + " + '<arg_value>' + (v if v is string else v | tojson) + '</arg_value>' + "
        + line
        + " -}}{%- endfor -%}"
        "{{- '</tool_call>' -}}"
    )
    return (
        "{{- '[gMASK]<sop>' -}}{%- if tools -%}{{- '<|system|>\\n# Tools\\n<tools>' -}}"
        + TOOLS_JSON
        + "{{- '\\n</tools>' -}}{%- endif -%}"
        + LAST_USER
        + "{%- for m in messages -%}{%- if m.role == 'user' -%}{{- '<|user|>' + "
        + line
        + " + m.content -}}"
        + ("" if seven else "{{- '/nothink' if " + OFF + " else '' -}}")
        + "{%- elif m.role == 'assistant' -%}{{- '<|assistant|>' -}}"
        + SPLIT_THOUGHT
        + "{%- if loop.index0 > at.user and r -%}{{- "
        + shown
        + " -}}{%- else -%}{{- "
        + empty
        + " -}}{%- endif -%}"
        "{%- if c.strip() -%}{{- " + line + " + c.strip() -}}{%- endif -%}"
        "{%- for c in m.tool_calls or [] -%}" + call + "{%- endfor -%}"
        "{%- elif m.role == 'tool' -%}"
        "{%- if messages[loop.index0 - 1].role != 'tool' -%}{{- '<|observation|>' -}}{%- endif -%}"
        "{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' -}}"
        "{%- else -%}{{- '<|system|>\\n' + m.content -}}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}"
        + (
            "{{- '</think>' if " + OFF + " else '<think>' -}}"
            if seven
            else "{{- '\\n<think></think>' if " + OFF + " else '' -}}"
        )
        + "{%- endif -%}"
    )


def deepseek(kind: str) -> str:
    """V3, V3.1 or R1."""
    opened = {
        "v3": "''",
        "r1": "'<think>\\n'",
        "v31": "('<think>' if thinking is defined and thinking else '</think>')",
    }[kind]
    answered = {"v3": "''", "r1": "''", "v31": "'</think>'"}[kind]
    fence = kind != "v31"
    call = (
        "'<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + c.function.name + '\\n```json\\n' + c.function.arguments + '\\n```<｜tool▁call▁end｜>'"
        if fence
        else "'<｜tool▁call▁begin｜>' + c.function.name + '<｜tool▁sep｜>' + (c.function.arguments if c.function.arguments is string else c.function.arguments | tojson) + '<｜tool▁call▁end｜>'"
    )
    has_calls = "m.role == 'assistant' and m.content is none" if fence else "m.role == 'assistant' and m.tool_calls"
    return (
        "{%- set ns = namespace(s='', tool=false) -%}{%- for m in messages -%}{%- if m.role == 'system' -%}"
        "{%- set ns.s = ns.s + m.content -%}{%- endif -%}{%- endfor -%}{{- bos_token + ns.s -}}"
        + ("{%- if tools -%}{{- '## Tools' -}}" + TOOLS_JSON + "{%- endif -%}" if not fence else "")
        + "{%- for m in messages -%}"
        "{%- if m.role == 'user' -%}{%- set ns.tool = false -%}{{- '<｜User｜>' + m.content -}}"
        "{%- elif " + has_calls + " -%}"
        "{%- if not ns.tool -%}{{- '<｜Assistant｜>' + " + answered + " -}}{%- endif -%}{{- m.content or '' -}}"
        "{{- '<｜tool▁calls▁begin｜>' -}}{%- for c in m.tool_calls -%}{{- " + call + " -}}{%- endfor -%}"
        "{{- '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' -}}{%- set ns.tool = false -%}"
        "{%- elif m.role == 'assistant' -%}"
        + ("{%- set t = m.content.split('</think>')[-1] -%}" if kind != "v3" else "{%- set t = m.content -%}")
        + "{%- if ns.tool -%}{{- "
        + ("'<｜tool▁outputs▁end｜>' + " if fence else "")
        + "t + '<｜end▁of▁sentence｜>' -}}{%- set ns.tool = false -%}"
        "{%- else -%}{{- '<｜Assistant｜>' + " + answered + " + t + '<｜end▁of▁sentence｜>' -}}{%- endif -%}"
        "{%- elif m.role == 'tool' -%}"
        + (
            "{{- '<｜tool▁output▁begin｜>' if ns.tool else '<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>' -}}"
            if fence
            else "{{- '<｜tool▁output▁begin｜>' -}}"
        )
        + "{{- m.content + '<｜tool▁output▁end｜>' -}}{%- set ns.tool = true -%}"
        "{%- endif -%}{%- endfor -%}"
        + ("{%- if ns.tool -%}{{- '<｜tool▁outputs▁end｜>' -}}{%- endif -%}" if fence else "")
        + "{%- if add_generation_prompt and not ns.tool -%}{{- '<｜Assistant｜>' + "
        + opened
        + " -}}{%- endif -%}"
    )


def kimi(thinks: bool) -> str:
    thought = (
        "{{- '<think>' + ((m.reasoning_content or '') if loop.index0 > at.user else '') + '</think>' -}}"
        if thinks
        else ""
    )
    return (
        LAST_USER
        + "{%- if tools -%}{{- '<|im_system|>tool_declare<|im_middle|>' + (tools | tojson) + '<|im_end|>' -}}{%- endif -%}"
        "{%- for m in messages -%}"
        "{%- if loop.first and m.role != 'system' -%}{{- '<|im_system|>system<|im_middle|>You are Kimi.<|im_end|>' -}}{%- endif -%}"
        "{%- if m.role == 'user' -%}{{- '<|im_user|>user<|im_middle|>' + m.content -}}"
        "{%- elif m.role == 'assistant' -%}{{- '<|im_assistant|>assistant<|im_middle|>' -}}"
        + thought
        + "{{- m.content or '' -}}"
        "{%- if m.tool_calls -%}{{- '<|tool_calls_section_begin|>' -}}{%- for c in m.tool_calls -%}"
        "{{- '<|tool_call_begin|>' + c['id'] + '<|tool_call_argument_begin|>' -}}"
        "{{- c.function.arguments if c.function.arguments is string else c.function.arguments | tojson -}}"
        "{{- '<|tool_call_end|>' -}}{%- endfor -%}{{- '<|tool_calls_section_end|>' -}}{%- endif -%}"
        "{%- elif m.role == 'tool' -%}{{- '<|im_system|>tool<|im_middle|>## Return of ' + (m.tool_call_id or '') + '\\n' + m.content -}}"
        "{%- else -%}{{- '<|im_system|>system<|im_middle|>' + m.content -}}{%- endif -%}{{- '<|im_end|>' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_assistant|>assistant<|im_middle|>' -}}{%- endif -%}"
    )


GPT_OSS = (
    "{{- '<|start|>system<|message|>Current date: ' + strftime_now('%Y-%m-%d') + '\\nReasoning: ' + (reasoning_effort or 'medium') + '<|end|>' -}}"
    "{%- set dev = '' -%}{%- if messages[0].role == 'system' -%}{%- set dev = messages[0].content -%}{%- set messages = messages[1:] -%}{%- endif -%}"
    "{%- if dev or tools -%}{{- '<|start|>developer<|message|>' + dev -}}"
    "{%- if tools -%}{{- '# Tools' -}}" + TOOLS_JSON + "{%- endif -%}{{- '<|end|>' -}}{%- endif -%}"
    "{%- set last = namespace(name='') -%}"
    "{%- for m in messages -%}{%- if m.role == 'assistant' -%}"
    "{%- if 'tool_calls' in m -%}"
    "{%- if m.tool_calls | length != 1 -%}{{- raise_exception('one tool call at once') -}}{%- endif -%}"
    "{%- if m.thinking -%}{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' -}}{%- endif -%}"
    "{%- set f = m.tool_calls[0].function -%}{%- set last.name = f.name -%}"
    "{{- '<|start|>assistant to=functions.' + f.name + '<|channel|>commentary json<|message|>' + (f.arguments | tojson) + '<|call|>' -}}"
    "{%- elif loop.last and not add_generation_prompt -%}"
    "{%- if m.thinking -%}{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' -}}{%- endif -%}"
    "{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' -}}"
    "{%- else -%}{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' -}}{%- endif -%}"
    "{%- elif m.role == 'tool' -%}{{- '<|start|>functions.' + last.name + ' to=assistant<|channel|>commentary<|message|>' + (m.content | tojson) + '<|end|>' -}}"
    "{%- else -%}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start|>assistant' -}}{%- endif -%}"
)
MINIMAX = (
    LAST_USER
    + "{%- set s = 'You are a helpful assistant.' -%}{%- if messages[0].role == 'system' -%}{%- set s = messages[0].content -%}{%- set messages = messages[1:] -%}{%- set at.user = at.user - 1 -%}{%- endif -%}"
    "{{- ']~!b[]~b]system\\n' + s -}}{%- if tools -%}{{- '\\n# Tools\\n<tools>' -}}"
    + TOOLS_JSON
    + "{{- '\\n</tools>' -}}{%- endif -%}{{- '[e~[\\n' -}}"
    "{%- for m in messages -%}{%- if m.role == 'assistant' -%}{{- ']~b]ai\\n' -}}"
    + SPLIT_THOUGHT
    + "{%- if r and loop.index0 > at.user -%}{{- '<think>\\n' + r + '\\n</think>\\n\\n' -}}{%- endif -%}{{- c -}}"
    "{%- if m.tool_calls -%}{{- '\\n<minimax:tool_call>' -}}{%- for t in m.tool_calls -%}"
    "{{- '\\n<invoke name=\"' + t.function.name + '\">' -}}{%- for k, v in t.function.arguments.items() -%}"
    "{{- '\\n<parameter name=\"' + k + '\">' + (v if v is string else v | tojson) + '</parameter>' -}}{%- endfor -%}{{- '\\n</invoke>' -}}"
    "{%- endfor -%}{{- '\\n</minimax:tool_call>' -}}{%- endif -%}{{- '[e~[\\n' -}}"
    "{%- elif m.role == 'tool' -%}{%- if messages[loop.index0 - 1].role != 'tool' -%}{{- ']~b]tool' -}}{%- endif -%}"
    "{{- '\\n<response>' + m.content + '</response>' -}}{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{- '[e~[\\n' -}}{%- endif -%}"
    "{%- else -%}{{- ']~b]user\\n' + m.content + '[e~[\\n' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- ']~b]ai\\n<think>\\n' -}}{%- endif -%}"
)
NEMOTRON = chatml(
    "{{- '<|im_start|>system\\n' + s -}}{%- if tools -%}{{- '\\n# Tools\\n<tools>' -}}"
    + TOOLS_JSON
    + "{{- '\\n</tools>' -}}{%- endif -%}{{- '<|im_end|>\\n' -}}",
    "{%- set c = m.content or '' -%}"
    "{%- if m.reasoning_content is string and m.reasoning_content -%}{%- set c = '<think>\\n' + m.reasoning_content + '\\n</think>\\n' + c -%}"
    "{%- elif '<think>' not in c and '</think>' not in c -%}{%- set c = '<think></think>' + c -%}{%- endif -%}"
    "{%- if loop.index0 < at.user and '</think>' in c -%}{%- set c = '<think></think>' + c.split('</think>')[-1].lstrip('\\n') -%}{%- endif -%}"
    "{{- c.strip() -}}" + XML_CALLS,
    "{{- '<think></think>' if " + OFF + " else '<think>\\n' -}}",
)
OLMO = chatml(
    "{{- '<|im_start|>system\\n' + (s or 'You are a helpful AI assistant.') -}}"
    "{%- if tools -%}{{- ' <functions>' + (tools | tojson) + '</functions>' -}}{%- else -%}{{- ' You have no functions. <functions></functions>' -}}{%- endif -%}{{- '<|im_end|>\\n' -}}",
    "{{- m.content or '' -}}{%- if m.tool_calls -%}{{- '<function_calls>' -}}{%- for t in m.tool_calls -%}"
    "{{- t.function.name + '(' -}}{%- for k, v in t.function.arguments.items() -%}{{- k + '=' + (v | tojson) + (', ' if not loop.last else '') -}}{%- endfor -%}{{- ')' + ('\\n' if not loop.last else '') -}}"
    "{%- endfor -%}{{- '</function_calls>' -}}{%- endif -%}",
    "{{- '<think>' -}}",
    tool="{{- '<|im_start|>environment\\n' + m.content + '<|im_end|>\\n' -}}",
    end="(eos_token if loop.last and not add_generation_prompt else '<|im_end|>\\n')",
)
SMOLLM3 = chatml(
    "{%- set mode = '/no_think' if " + OFF + " else '/think' -%}"
    "{{- '<|im_start|>system\\nToday Date: ' + strftime_now('%d %B %Y') + '\\nReasoning Mode: ' + mode + '\\n\\n' + s + '<|im_end|>\\n' -}}",
    "{%- if mode == '/think' -%}{{- m.content.lstrip('\\n') -}}"
    "{%- else -%}{{- '<think>\\n\\n</think>\\n' + m.content.lstrip('\\n') -}}{%- endif -%}",
    "{{- '<think>\\n\\n</think>\\n' if mode == '/no_think' else '' -}}",
)
GEMMA3 = (
    "{{- bos_token -}}{%- set s = '' -%}{%- if messages[0].role == 'system' -%}{%- set s = messages[0].content + '\\n\\n' -%}{%- set messages = messages[1:] -%}{%- endif -%}"
    "{%- for m in messages -%}"
    "{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}{{- raise_exception('Conversation roles must alternate') -}}{%- endif -%}"
    "{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + (s if loop.first else '') + (m.content | trim) + '<end_of_turn>\\n' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}"
)
GEMMA4 = (
    "{{- bos_token -}}{%- set on = enable_thinking is defined and enable_thinking -%}{%- set s = '' -%}"
    "{%- if messages[0].role == 'system' -%}{%- set s = messages[0].content | trim -%}{%- set messages = messages[1:] -%}{%- endif -%}"
    + LAST_USER
    + "{%- if s or tools or on -%}{{- '<|turn>system\\n' + ('<|think|>\\n' if on else '') + s -}}"
    "{%- for t in tools or [] -%}{{- '<|tool>declaration:' + t.function.name + '<tool|>' -}}{%- endfor -%}{{- '<turn|>\\n' -}}{%- endif -%}"
    "{%- for m in messages -%}"
    "{%- if m.role == 'assistant' -%}"
    "{%- if messages[loop.index0 - 1].role != 'tool' -%}{{- '<|turn>model\\n' -}}{%- endif -%}"
    "{%- set r = m.reasoning_content or m.reasoning or '' -%}"
    "{%- if r and loop.index0 > at.user -%}{{- '<|channel>thought\\n' + r + '\\n<channel|>' -}}{%- endif -%}"
    "{%- for t in m.tool_calls or [] -%}{{- '<|tool_call>call:' + t.function.name + '{' -}}"
    "{%- for k, v in t.function.arguments.items() -%}{{- k + ':' + ('<|\"|>' + v + '<|\"|>' if v is string else v | tojson) + (',' if not loop.last else '') -}}{%- endfor -%}"
    "{{- '}<tool_call|>' -}}{%- endfor -%}{{- m.content | trim -}}"
    "{%- if m.tool_calls -%}{{- '<|tool_response>' -}}{%- else -%}{{- '<turn|>\\n' -}}{%- endif -%}"
    "{%- elif m.role == 'tool' -%}{{- 'response:' + m.content + '<tool_response|>' -}}"
    "{%- else -%}{{- '<|turn>' + m.role + '\\n' + (m.content | trim) + '<turn|>\\n' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt and messages[-1].role != 'tool' -%}{{- '<|turn>model\\n' + ('' if on else '<|channel>thought\\n<channel|>') -}}{%- endif -%}"
)
MISTRAL_RESULT = "{%- if m.tool_call_id is not defined or m.tool_call_id | length != 9 -%}{{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') -}}{%- endif -%}"
NEMO = (
    "{%- set s = '' -%}{%- if messages[0].role == 'system' -%}{%- set s = messages[0].content + '\\n\\n' -%}{%- set messages = messages[1:] -%}{%- endif -%}"
    + LAST_USER
    + "{{- bos_token -}}{%- for m in messages -%}"
    "{%- if m.role == 'user' -%}{%- if tools and loop.index0 == at.user -%}{{- '[AVAILABLE_TOOLS][' -}}{%- for t in tools -%}{{- t | tojson + (', ' if not loop.last else '') -}}{%- endfor -%}{{- '][/AVAILABLE_TOOLS]' -}}{%- endif -%}"
    "{{- '[INST]' + (s if loop.last else '') + m.content + '[/INST]' -}}"
    "{%- elif m.role == 'assistant' and m.tool_calls -%}{{- '[TOOL_CALLS][' -}}{%- for c in m.tool_calls -%}"
    "{%- if c.id is not defined or c.id | length != 9 -%}{{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') -}}{%- endif -%}"
    "{{- (c.function | tojson)[:-1] + ', \"id\": \"' + c.id + '\"}' + (', ' if not loop.last else '') -}}{%- endfor -%}{{- ']' + eos_token -}}"
    "{%- elif m.role == 'assistant' -%}{{- m.content + eos_token -}}"
    "{%- elif m.role == 'tool' -%}"
    + MISTRAL_RESULT
    + "{{- '[TOOL_RESULTS]{\"content\": ' + m.content + ', \"call_id\": \"' + m.tool_call_id + '\"}[/TOOL_RESULTS]' -}}"
    "{%- endif -%}{%- endfor -%}"
)
MISTRAL_SMALL = (
    "{{- bos_token -}}{%- set s = 'You are Mistral Small.' -%}{%- if messages[0].role == 'system' -%}{%- set s = messages[0].content -%}{%- set messages = messages[1:] -%}{%- endif -%}"
    "{{- '[SYSTEM_PROMPT]' + s + '[/SYSTEM_PROMPT]' -}}{%- if tools -%}{{- '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' -}}{%- endif -%}"
    "{%- for m in messages -%}{%- if m.role == 'user' -%}{{- '[INST]' + (m.content if m.content is string else m.content[0].text) + '[/INST]' -}}"
    "{%- elif m.role == 'assistant' -%}{{- m.content or '' -}}{%- for c in m.tool_calls or [] -%}{{- '[TOOL_CALLS]' + c.function.name + '[ARGS]' + (c.function.arguments if c.function.arguments is string else c.function.arguments | tojson) -}}{%- endfor -%}{{- eos_token -}}"
    "{%- elif m.role == 'tool' -%}{{- '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' -}}{%- endif -%}{%- endfor -%}"
)
PHI4 = (
    "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '<|im_sep|>' -}}{%- if m.role == 'assistant' -%}"
    "{% generation %}{{- m.content + '<|im_end|>' -}}{% endgeneration %}{%- else -%}{{- m.content + '<|im_end|>' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant<|im_sep|>' -}}{%- endif -%}"
)
GRANITE = (
    "{%- set s = 'You are Granite.' -%}{%- if messages[0].role == 'system' -%}{%- set s = messages[0].content -%}{%- set messages = messages[1:] -%}{%- endif -%}"
    "{{- '<|start_of_role|>system<|end_of_role|>Today\\'s Date: ' + strftime_now('%B %d, %Y') + '.\\n' + s + (' Think first.' if thinking else '') + '<|end_of_text|>\\n' -}}"
    "{%- if tools -%}{{- '<|start_of_role|>available_tools<|end_of_role|>' + (tools | tojson(indent=4)) + '<|end_of_text|>\\n' -}}{%- endif -%}"
    "{%- for m in messages -%}{{- '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start_of_role|>assistant<|end_of_role|>' -}}{%- endif -%}"
)
TURN = "'<|START_OF_TURN_TOKEN|><|{}_TOKEN|>'"
COMMAND = (
    "{{- bos_token + "
    + TURN.format("SYSTEM")
    + " + 'You are Command.' -}}{%- if tools -%}{{- '\\n## Available Tools' -}}"
    + TOOLS_JSON
    + "{%- endif -%}"
    "{%- if messages[0].role == 'system' -%}{{- '\\n# Developer Preamble\\n' + messages[0].content -}}{%- set messages = messages[1:] -%}{%- endif -%}{{- '<|END_OF_TURN_TOKEN|>' -}}"
    "{%- for m in messages -%}{%- if m.role == 'user' -%}{{- "
    + TURN.format("USER")
    + " + m.content + '<|END_OF_TURN_TOKEN|>' -}}"
    "{%- elif m.role == 'assistant' -%}{{- " + TURN.format("CHATBOT") + " -}}"
    "{%- if m.tool_calls -%}{{- '<|START_ACTION|>[' -}}{%- for c in m.tool_calls -%}"
    "{{- '\\n    {\"tool_call_id\": \"' ~ loop.index0 ~ '\", \"tool_name\": \"' + c.function.name + '\", \"parameters\": ' + (c.function.arguments | tojson) + '}' + (',' if not loop.last else '') -}}{%- endfor -%}{{- '\\n]<|END_ACTION|><|END_OF_TURN_TOKEN|>' -}}"
    "{%- else -%}{{- '<|START_RESPONSE|>' + m.content + '<|END_RESPONSE|><|END_OF_TURN_TOKEN|>' -}}{%- endif -%}"
    "{%- elif m.role == 'tool' -%}{{- "
    + TURN.format("SYSTEM")
    + " + '<|START_TOOL_RESULT|>' + m.content + '<|END_TOOL_RESULT|><|END_OF_TURN_TOKEN|>' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- " + TURN.format("CHATBOT") + " -}}{%- endif -%}"
)
LFM2 = (
    "{{- bos_token -}}{%- set s = '' -%}{%- if messages[0].role == 'system' -%}{%- set s = messages[0].content -%}{%- set messages = messages[1:] -%}{%- endif -%}"
    "{%- if tools -%}{%- set s = s + '\\nList of tools: <|tool_list_start|>' + (tools | tojson) + '<|tool_list_end|>' -%}{%- endif -%}"
    "{%- if s -%}{{- '<|im_start|>system\\n' + s + '<|im_end|>\\n' -}}{%- endif -%}"
    "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\\n' -}}{%- set c = m.content -%}"
    "{%- if m.role == 'tool' -%}{%- set c = '<|tool_response_start|>' + c + '<|tool_response_end|>' -%}"
    "{%- elif m.role == 'assistant' and not loop.last and '</think>' in c -%}{%- set c = c.split('</think>')[-1].strip() -%}{%- endif -%}"
    "{{- c + '<|im_end|>\\n' -}}{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
LLAMA = dict(
    eos="<|eot_id|>",
    special=(
        "<|begin_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|python_tag|>",
    ),
    ends=("<|eot_id|>", "<|eom_id|>"),
    bos="<|begin_of_text|>",
)
DEEPSEEK = dict(
    eos="<｜end▁of▁sentence｜>",
    bos="<｜begin▁of▁sentence｜>",
    special=(
        *("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        *(
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁call▁begin｜>",
            "<｜tool▁sep｜>",
            "<｜tool▁call▁end｜>",
            "<｜tool▁calls▁end｜>",
        ),
        *("<｜tool▁outputs▁begin｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>", "<｜tool▁outputs▁end｜>"),
    ),
    plain=("<｜User｜>", "<｜Assistant｜>", *TAGS),
)
GLM = dict(
    eos="<|endoftext|>",
    special=("<|user|>", "<|assistant|>", "<|system|>", "<|observation|>", "[gMASK]", "<sop>"),
    plain=(*TAGS, "<tool_call>", "</tool_call>"),
    ends=("<|endoftext|>", "<|user|>", "<|observation|>"),
)
KIMI = dict(
    eos="<|im_end|>",
    special=(
        *("<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>", "<|tool_calls_section_begin|>"),
        *("<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"),
    ),
    plain=TAGS,
)
MISTRAL = dict(
    eos="</s>",
    bos="<s>",
    special=(
        *("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[AVAILABLE_TOOLS]"),
        *("[/AVAILABLE_TOOLS]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[ARGS]"),
    ),
)
QWEN = dict(eos="<|im_end|>", plain=(*TAGS, "<tool_call>", "</tool_call>"), ends=("<|im_end|>", "<|endoftext|>"))
FAMILIES = {
    "llama-3.1": Family(llama("{%- set date = date_string or '26 Jul 2024' -%}"), **LLAMA),
    "llama-3.2": Family(llama("{%- set date = date_string or strftime_now('%d %b %Y') -%}"), **LLAMA),
    "qwen2.5": Family(chatml(head("You are Qwen."), "{{- m.content or '' -}}" + JSON_CALLS, ""), **QWEN),
    "qwen3": Family(chatml(head(), QWEN3, "{{- '<think>\n\n</think>\n\n' if " + OFF + " else '' -}}"), **QWEN),
    "qwen3.5": Family(chatml(head(), QWEN35, "{{- '<think>\\n' + ('\\n</think>\\n\\n' if " + OFF + " else '') -}}"), **QWEN),
    "qwen3-coder": Family(chatml(head(), "{{- m.content or '' -}}" + XML_CALLS, ""), **QWEN),
    "glm-4.5": Family(glm(seven=False), **GLM),
    "glm-4.7": Family(glm(seven=True), **GLM),
    "deepseek-v3": Family(deepseek("v3"), **DEEPSEEK),
    "deepseek-v3.1": Family(deepseek("v31"), **DEEPSEEK),
    "deepseek-r1": Family(deepseek("r1"), **DEEPSEEK),
    "kimi-k2": Family(kimi(thinks=False), **KIMI),
    "kimi-k2-thinking": Family(kimi(thinks=True), **KIMI),
    "gpt-oss": Family(
        GPT_OSS,
        eos="<|return|>",
        special=("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>", "<|call|>"),
        ends=("<|return|>", "<|call|>"),
    ),
    "minimax-m2": Family(MINIMAX, eos="[e~[", special=("]~!b[", "]~b]", "[e~["), plain=TAGS),
    "nemotron-3": Family(NEMOTRON, eos="<|im_end|>", plain=TAGS),
    "olmo-3": Family(OLMO, eos="<|endoftext|>", ends=("<|im_end|>", "<|endoftext|>")),
    "smollm3": Family(SMOLLM3, eos="<|im_end|>", plain=TAGS),
    "gemma-3": Family(
        GEMMA3, eos="<end_of_turn>", bos="<bos>", special=("<bos>", "<start_of_turn>", "<end_of_turn>"), ends=("<end_of_turn>",)
    ),
    "gemma-4": Family(
        GEMMA4,
        eos="<turn|>",
        bos="<bos>",
        special=("<bos>", "<|turn>", "<turn|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<|channel>", "<channel|>"),
        ends=("<turn|>", "<|tool_response>"),
    ),
    "mistral-nemo": Family(NEMO, **MISTRAL),
    "mistral-small": Family(MISTRAL_SMALL, **MISTRAL),
    "phi-4": Family(PHI4, eos="<|im_end|>", special=("<|im_sep|>",)),
    "granite-3.3": Family(GRANITE, eos="<|end_of_text|>", special=("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>")),
    "command-r7b": Family(
        COMMAND,
        eos="<|END_OF_TURN_TOKEN|>",
        bos="<BOS_TOKEN>",
        special=(
            *("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
            *("<|SYSTEM_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_ACTION|>", "<|END_ACTION|>"),
        ),
    ),
    "lfm2": Family(LFM2, eos="<|im_end|>", bos="<|startoftext|>", special=("<|startoftext|>",), plain=TAGS),
}  # fmt: skip


def make(name: str, folder: Path) -> ChatTokenizer:
    """The family's target, as far as its data goes: tokenizer and configurations, no weights."""
    family = FAMILIES[name]
    named = {"eos_token": family.eos} | ({"bos_token": family.bos} if family.bos else {})
    newlines = ["two cats.\n\none dog.\n\n\n"] * 50  # runs of newlines become tokens, so that borders could fuse
    tokenizer = tiny.tokenizer(
        *family.special, plain=family.plain, more_text=newlines, split=PIECES, chat_template=family.template, **named
    )
    tokenizer.save_pretrained(folder)
    ends = tokenizer.convert_tokens_to_ids(list(family.ends or (family.eos,)))
    GenerationConfig(eos_token_id=ends).save_pretrained(folder)
    config = {"model_type": "llama", "vocab_size": len(tokenizer), "eos_token_id": ends[0]}
    (folder / "config.json").write_text(json.dumps(config))
    return ChatTokenizer(str(folder))


TOOL = {
    "type": "function",
    "function": {
        "description": "The weather in a town.",
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}, "days": {"type": "integer"}}},
    },
}


def call(number: int, **arguments: object) -> dict[str, object]:
    return {"id": f"abcd{number:05d}", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}


def asked(text: str) -> dict[str, object]:
    return {"role": "user", "content": text}


def said(text: str, thought: str = "", *calls: dict[str, object]) -> dict[str, object]:
    more = ({"reasoning_content": thought} if thought else {}) | ({"tool_calls": list(calls)} if calls else {})
    return {"role": "assistant", "content": text} | more


def result(number: int, text: str) -> dict[str, object]:
    return {"role": "tool", "content": text, "tool_call_id": f"abcd{number:05d}", "name": "get_weather"}


CATS = asked("How many cats?")
SHAPES: dict[str, dict[str, object]] = {
    "one turn": {"messages": [CATS, said("Two cats.")]},
    "three turns": {"messages": [CATS, said("Two."), asked("Dogs?"), said("One."), asked("Sure?"), said("Yes.")]},
    "system": {"messages": [{"role": "system", "content": "Be brief."}, CATS, said("Two.")]},
    "tool call with result and answer": {
        "tools": [TOOL],
        "messages": [asked("Rain?"), said("", "", call(1, town="Linz", days=2)), result(1, "sun"), said("No rain.")],
    },
    "parallel calls": {
        "tools": [TOOL],
        "messages": [
            asked("Rain?"),
            said("", "", call(1, town="Linz"), call(2, town="Graz")),
            *(result(1, "sun"), result(2, "fog"), said("No rain.")),
        ],
    },
    "thought in the last turn": {"messages": [CATS, said("Two."), asked("Dogs?"), said("One.", "I count dogs.")]},
    "thoughts in all turns": {
        "messages": [CATS, said("Two.", "I count cats."), asked("Dogs?"), said("One.", "I count dogs.")]
    },
    "thought inside the content": {"messages": [CATS, said("<think>\nI count cats.\n</think>\n\nTwo.")]},
    "empty answer": {"messages": [CATS, said(""), asked("Dogs?"), said("One.")]},
    "emoji and marker text": {
        "messages": [
            asked("Say <|im_start|>user\n 👍🏽"),
            said("👩‍👩‍👧‍👦 Kätzchen <b>二</b> [x](y)\n\n```\n\tdef f():\n```"),
        ]
    },
}
