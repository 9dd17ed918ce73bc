"""Which chat format each family speaks, by what its template spells, and how it is asked for reasoning."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_chat_format import vocabulary
from test_tools import ROME, WEATHER, WRITTEN, gathered

from numoe.engine.chat.format import ChatFormat
from numoe.engine.chat.formats import chat_format
from numoe.engine.chat.formats.answered import AnsweredChat
from numoe.engine.chat.formats.deepseek_v4 import DeepSeekV4Chat
from numoe.engine.chat.formats.harmony import HarmonyChat
from numoe.engine.chat.formats.jinja import JinjaChat
from numoe.engine.chat.formats.solar import SolarChat, SolarSplitter
from numoe.engine.chat.thinking import asked, opens_thinking
from numoe.engine.chat.tools.call import Use
from numoe.engine.chat.tools.reader import CallSplitter
from numoe.engine.families import found
from numoe.engine.text.tags import DSML, TAGS

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
    "hunyuan_v1_moe": (AnsweredChat, THINK, "<think>\nwhy\n</think>\n<answer>\nso\n</answer>"),
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


# How released models of a family call tools: marks of `test_tools.WRITTEN`, or what they write, where that is not it.
HARMONY_CALL = '<|channel|>commentary to=functions.get_weather <|message|>{"city": "Rome", "days": 3}<|call|>'
CALLS = {
    "<tool_call>": "afmoe bailing_moe exaone4 exaone_moe granitemoehybrid mellum qwen2 qwen2_moe qwen3 qwen3_moe "
    "qwen3_next qwen3_vl qwen3_vl_moe qwen3_vl_moe_text qwen3_vl_text smollm3",
    "<tool_call><function=": "afmoe mimo_v2_flash nemotron_h qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text "
    "qwen3_moe qwen3_next qwen4_exp qwen4_exp_text",
    "<tool_call><arg_key>": "bailing_hybrid glm4_moe glm4v_moe glm4v_moe_text glm4_moe_lite glm_moe_dsa laguna",
    "<arg_key{}><tool_sep{}>": "hy_v3",
    "<minimax:tool_call>": "minimax_m2",
    "<|tool_calls_section_begin|>": "kimi_k2 kimi_k25 kimi_linear",
    "<|tool_call>": "gemma4 gemma4_text",
    "<|tool_call_start|>": "lfm2_moe",
    "<|tool_call|>": "granite granitemoe granitemoeshared",
    "[TOOL_CALLS][ARGS]": "mistral ministral3 mistral3 mistral4",
    "[TOOL_CALLS]": "mistral mixtral",
    "<｜tool▁calls▁begin｜>": "deepseek_v3",
    "<｜tool▁calls▁begin｜>```json": "deepseek_v2 deepseek_v3",
    f"<{DSML}tool_calls>": "deepseek_v32 deepseek_v4",
    "<tool_calls>```json": "hunyuan_v1_moe",
    "<|START_ACTION|>": "cohere2_moe",
    '"parameters": dictionary of argument': "llama llama4 llama4_text",
    "<|tool_calls|>": "solar_open",
    "<seed:tool_call>": "seed_oss",
    HARMONY: "gpt_oss",
}
WITHOUT_CALLS = {"dots1", "ernie4_5_moe", "flint", "gemma3", "gemma3_text", "glm4", "olmo2", "olmo3", "olmoe", "phi3",
                 "phimoe", "qwen2_5_vl", "qwen2_5_vl_text", "qwen2_vl", "qwen2_vl_text"}  # fmt: skip
"""Their released templates tell of no calls, or there is none; those of glm4 and olmo3 are not read."""
WRITTEN_CALLS = dict(WRITTEN) | {
    "<|START_ACTION|>": '<|START_ACTION|>[{"tool_call_id": "0", "tool_name": "get_weather", "parameters": '
    '{"city": "Rome", "days": 3}}]<|END_ACTION|>',
    "<seed:tool_call>": "<seed:tool_call>\n<function=get_weather>\n<parameter=city>Rome</parameter>\n"
    "<parameter=days>3</parameter>\n</function>\n</seed:tool_call>",
    "<|tool_calls|>": '<|end|><|begin|>assistant<|tool_calls|><|tool_call:begin|>0<|tool_call:name|>get_weather'
    '<|tool_call:args|>{"city": "Rome", "days": 3}<|tool_call:end|>',
    HARMONY: f"<|end|><|start|>assistant{HARMONY_CALL}",
}  # fmt: skip


def test_every_family_s_calls_are_told_or_known_to_be_none() -> None:
    assert {family for families in CALLS.values() for family in families.split()} == set(found()) - WITHOUT_CALLS


@pytest.mark.parametrize(("sign", "model_type"), [(s, one) for s, many in CALLS.items() for one in many.split()])
def test_a_family_s_reasoning_and_calls_are_told_however_they_are_cut(sign: str, model_type: str) -> None:
    _, template, completion = OF_THEIR_OWN.get(model_type.removesuffix("_text"), USUAL)
    given = vocabulary(f"{{{{ messages[0].content }}}}{template}{{# {sign} #}}" if template else None)
    chat, use = chat_format(model_type, given), Use([WEATHER])
    before, why, behind = completion.partition("why")
    closing = "" if model_type in ("solar_open", "gpt_oss") else behind.removesuffix("so").partition("<answer>")[0]
    whole = before + why + closing + WRITTEN_CALLS[sign]
    for cut in range(len(whole)):
        reader = chat.reader(use)
        splitter = chat.splitter(False, use=use)
        splitter = CallSplitter(splitter, reader) if reader else splitter
        parts = splitter.push(whole[:cut]) + splitter.push(whole[cut:]) + splitter.flush()
        thought = "".join(text for kind, text in parts if kind == "thinking")
        said, calls, _ = gathered(parts)
        assert (thought.strip("\n"), said.strip("\n"), calls) == ("why", "", [("get_weather", ROME)])


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


ANSWERED = [
    ("<think>why</think>\n<answer>\nso\n</answer>", "why", "so"),
    ("<answer>so</answer>\n", "", "so"),
    ("<think>why</think><answer>\n\na\n\nb\n\n</answer>\n\n", "why", "a\n\nb"),
    ("<answer>ends by `</answer>`, and </answer> too.\n</answer>", "", "ends by `</answer>`, and </answer> too."),
    ("<answer>so</answer>\n<tool_calls>[]</tool_calls>", "", "so<tool_calls>[]</tool_calls>"),
    ("<think>why</think>\n<answer>cut </ans", "why", "cut </ans"),
    ("<think>why</think>at <answer>once</answer>", "why", "at <answer>once</answer>"),
    ("< answer", "", "< answer"),
    ("<ans", "", "<ans"),
]


@pytest.mark.parametrize("tag", ["answer", "response"])
@given(st.sampled_from(ANSWERED), st.data())
def test_tags_around_an_answer_are_left_out_however_it_is_cut(
    tag: str, case: tuple[str, str, str], data: st.DataObject
) -> None:
    completion, thinking, answer = (text.replace("answer", tag) for text in case)
    chat = chat_format("llama", vocabulary(f"{{# <{tag}></{tag}> #}}{{{{ messages[0].content }}}}"))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(completion)))))
    splitter, told = chat.splitter(False), {"thinking": "", "text": ""}
    parts = [part for a, b in pairwise([0, *cuts, len(completion)]) for part in splitter.push(completion[a:b])]
    for kind, text in parts + splitter.flush():
        told[kind] += text
    assert (told["thinking"], told["text"].lstrip()) == (thinking, answer.lstrip())
    parsed = chat.parse(completion, thinking=False)
    assert (parsed["reasoning_content"], parsed["content"]) == (thinking, answer)


def test_text_before_a_closing_tag_alone_was_no_answer() -> None:
    chat = chat_format("hunyuan_v1_moe", vocabulary("{{ messages[0].content }}"))
    splitter = chat.splitter(False)
    parts = splitter.push("why</think><answer>so</answer>") + splitter.flush()
    assert parts == [("text", "why"), ("closed", ""), ("text", "so")]
    assert type(chat_format("minimax_m2", vocabulary("{{ ']~b]tool<response></response>' }}"))) is JinjaChat


def test_every_pair_of_tags_is_one_of_its_own() -> None:
    assert len({tag for tags in TAGS for tag in tags}) == 2 * len(TAGS)
