"""Which chat format each family speaks, by what its template spells, and how it is asked for reasoning."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_chat_format import vocabulary

from numoe.engine.chat.format import ChatFormat
from numoe.engine.chat.formats import chat_format
from numoe.engine.chat.formats.deepseek_v4 import DeepSeekV4Chat
from numoe.engine.chat.formats.harmony import HarmonyChat
from numoe.engine.chat.formats.jinja import JinjaChat
from numoe.engine.chat.formats.solar import SolarChat, SolarSplitter
from numoe.engine.chat.thinking import asked, opens_thinking
from numoe.engine.families import found
from numoe.engine.text.tags import TAGS

# The end of a family's own template: the beginning of an answer, without and with reasoning.
THINK = "{% if enable_thinking %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}"
CHANNELS = "{{ '<|channel>thought\n<channel|>' if not enable_thinking }}"
HUNYUAN = (
    "{% set effort = reasoning_effort if reasoning_effort is defined else 'no_think' %}"
    "{{ '<think{}>'.format(':opensource') }}{% if effort == 'no_think' %}{{ '</think{}>'.format(':opensource') }}"
    "{% endif %}"
)
NORTH = (
    "{% set reasoning = not (reasoning_effort is defined and reasoning_effort | lower == 'none') %}"
    "<|START_THINKING|>{% if not reasoning %}<|END_THINKING|>{% endif %}"
)
SOLAR = (
    "{% set effort = reasoning_effort if reasoning_effort is defined else 'high' %}"
    "{% if effort in ['low', 'minimal'] %}<|begin|>assistant<|think|><|end|>{% endif %}<|begin|>assistant"
    "{# <|content|> #}"
)
HARMONY = "<|start|>assistant{# <|channel|>final<|message|> #}"
OF_THEIR_OWN = {
    "deepseek_v4": (DeepSeekV4Chat, "", "<think>why</think>so"),
    "gpt_oss": (HarmonyChat, HARMONY,
                "<|channel|>analysis<|message|>why<|end|><|start|>assistant<|channel|>final<|message|>so"),
    "solar_open": (SolarChat, SOLAR, "<|think|>why<|end|><|begin|>assistant<|content|>so<|end|>"),
    "gemma4": (JinjaChat, CHANNELS, "<|channel>thought\nwhy\n<channel|>so"),
    "hy_v3": (JinjaChat, HUNYUAN, "<think:opensource>why</think:opensource>so"),
    "cohere2_moe": (JinjaChat, NORTH, "<|START_THINKING|>why<|END_THINKING|>so"),
}  # fmt: skip
USUAL = JinjaChat, THINK, "<think>\nwhy\n</think>\n\nso"


def spoken(model_type: str) -> tuple[ChatFormat, type[ChatFormat], str]:
    kind, template, completion = OF_THEIR_OWN.get(model_type.removesuffix("_text"), USUAL)
    given = "{{ messages[0].content }}" + template if template else None
    return (
        chat_format(model_type, vocabulary(given, "<think:opensource>", "</think:opensource>", "<|message|>")),
        kind,
        completion,
    )


@pytest.mark.parametrize("model_type", found())
def test_a_family_s_reasoning_is_told_from_its_answer_however_it_is_cut(model_type: str) -> None:
    chat, kind, completion = spoken(model_type)
    assert type(chat) is kind
    parsed = chat.parse(completion, thinking=False)
    assert (parsed["reasoning_content"], parsed["content"]) == ("why", "so")
    for cut in range(len(completion)):
        splitter, told = chat.splitter(False), {"thinking": "", "text": ""}
        for part, text in splitter.push(completion[:cut]) + splitter.push(completion[cut:]) + splitter.flush():
            told[part] += text
        assert (told["thinking"].strip("\n"), told["text"].lstrip("\n")) == ("why", "so")


@pytest.mark.parametrize("model_type", [*OF_THEIR_OWN, "qwen3_moe"])
def test_a_family_is_asked_for_reasoning_or_not(model_type: str) -> None:
    chat = spoken(model_type)[0]
    without, with_it = (chat.render([{"role": "user", "content": "q"}], thinking=on) for on in (False, True))
    assert (without != with_it) == (model_type != "gpt_oss")  # which always reasons
    assert not opens_thinking(without, chat.tags)
    assert opens_thinking(with_it, chat.tags) == (model_type not in ("gpt_oss", "solar_open", "gemma4"))


@pytest.mark.parametrize(
    ("template", "off"),
    [
        ("{% if thinking_mode is defined and thinking_mode == 'disabled' %}{% endif %}", {"thinking_mode": "disabled"}),
        ("{{ 'When thinking is enabled' }}{% if reasoning_effort is not defined %}{{ 'none' }}{% endif %}",
         {"reasoning_effort": "none"}),
        ("{% if enable_thinking is defined or reasoning_effort is defined %}{{ 'none' }}{% endif %}", {}),
        ("{% if thinking %}{% if reasoning_effort is defined %}{{ 'none' }}{% endif %}{% endif %}", {}),
        ("reasoning_effort is none {{ messages }}", {}),
        ("{% if reasoning_effort is defined %}{{ reasoning_effort }}{% endif %}", {}),
    ],
)  # fmt: skip
def test_other_switches_are_used_where_the_usual_one_is_not_read(template: str, off: dict[str, Any]) -> None:
    assert asked(template, False) == off
    assert asked(template, True).keys() == off.keys() and (not off or asked(template, True) != off)


SOLARS = [
    ("<|think|>why<|end|><|begin|>assistant<|content|>so<|end|>", "why", "so"),
    ("<|content|>at once", "", "at once"),
    ("goes on < <|", "", "goes on < <|"),
    ("<|think|>cut <|en", "cut <|en", ""),
    ("<|think|><|end|><|begin|>assistant<|tool_calls|><|tool_call:begin|>a", "", "<|tool_call:begin|>a"),
]


@given(st.sampled_from(SOLARS), st.data())
def test_solars_messages_are_told_apart_however_they_are_cut(case: tuple[str, str, str], data: st.DataObject) -> None:
    completion, thinking, answer = case
    cuts = sorted(data.draw(st.sets(st.integers(0, len(completion)))))
    splitter, told = SolarSplitter(False), {"thinking": "", "text": ""}
    parts = [part for a, b in pairwise([0, *cuts, len(completion)]) for part in splitter.push(completion[a:b])]
    for kind, text in parts + splitter.flush():
        told[kind] += text
    assert told == {"thinking": thinking, "text": answer}


def test_every_pair_of_tags_is_one_of_its_own() -> None:
    assert len({tag for tags in TAGS for tag in tags}) == 2 * len(TAGS)
