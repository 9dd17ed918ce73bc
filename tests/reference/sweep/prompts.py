"""Each family's own chat templates: rendered prompts, byte for byte, against transformers' apply_chat_template.

A conversation after a system message, one of several turns, one with tools, calls and their results, and one with
reasoning in its history; each with reasoning asked for and not.
"""

import copy
import tempfile
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import transformers
from chats import Messages, byte_tokenizer, templates
from report import Report

from numoe.engine.chat.format import ChatFormat
from numoe.engine.chat.formats import chat_format
from numoe.engine.chat.prompt import encode
from numoe.engine.chat.tools.call import Tool, Use
from numoe.engine.families import found
from numoe.engine.text.tokenizer import load_tokenizer
from numoe.quant.errors import InputError

TEMPLATES = {
    "afmoe": ["arcee-ai-Trinity-Mini", "arcee-ai-Trinity-Large-Thinking"],
    "bailing_hybrid": ["inclusionai-ling-3.0-flash", "Ling-3.0-tiny*", "inclusionAI-Ring-2.5-1T"],
    "bailing_moe": ["inclusionAI-Ring-mini-2.0", "inclusionAI-Ling-lite-1.5", "inclusionAI-Ring-1T"],
    "cohere2_moe": ["Cohere2MoE"],
    "deepseek_v2": ["deepseek-ai-DeepSeek-V2-Lite-Chat", "deepseek-ai-DeepSeek-Coder-V2-Instruct-0724"],
    "deepseek_v3": ["deepseek-ai-DeepSeek-V3.1", "deepseek-v3-0324*", "deepseek-r1-0528 *", "deepseek-r1 *"],
    "deepseek_v32": ["deepseek-ai-DeepSeek-V3.2"],
    "dots1": ["dots-studio-dots.llm1.inst"],
    "ernie4_5_moe": ["baidu-ERNIE-4.5-21B-A3B-Base-PT", "Ernie4.5*"],
    "gemma3": ["gemma3", "gemma-3-it*", "unsloth-gemma-3-270m-it"],
    "gemma4": ["google-gemma-4-26B-A4B-it", "google-gemma-4-31B-it", "gemma4", "gemma4_v5"],
    "glm4_moe": ["unsloth-GLM-4.5-Air", "GLM-4.6", "GLM-4.7 *"],
    "glm4_moe_lite": ["GLM-4.7-Flash"],
    "glm_moe_dsa": ["zai-org-GLM-5", "zai-org-GLM-5.1", "zai-org-GLM-5.2", "glm-5.3*"],
    "gpt_oss": ["openai-gpt-oss-120b", "unsloth-gpt-oss-20b"],
    "granitemoe": ["ibm-granite-granite-3.0-8b-instruct", "ibm-granite-granite-3.1-8b-instruct"],
    "granitemoehybrid": ["ibm-granite-granite-4.0", "ibm-granite-granite-4.1"],
    "hunyuan_v1_moe": ["tencent-Hunyuan-A13B-Instruct", "tencent-Hunyuan-7B-Pretrain"],
    "hy_v3": ["tencent-Hy3", "tencent-Hy3-preview", "Hy-MT2-30B-A3B*"],
    "kimi_k2": ["moonshotai-Kimi-K2-Instruct", "moonshotai-Kimi-K2-Instruct-0905", "moonshotai-Kimi-K2-Thinking"],
    "kimi_k25": ["moonshotai-Kimi-K2.5", "moonshotai-Kimi-K2.6", "moonshotai-Kimi-K2.7-Code"],
    "kimi_linear": ["moonshotai-Kimi-Linear-48B-A3B-Instruct"],
    "laguna": ["poolside-Laguna-XS.2", "poolside-Laguna-XS-2.1", "poolside-Laguna-S-2.1"],
    "lfm2_moe": ["LFM2-8B-A1B", "LFM2.5-8B-A1B"],
    "llama": ["meta-llama-Llama-3.1-8B-Instruct", "meta-llama-Llama-3.3-70B-Instruct",
              "meta-llama-Llama-3.2-3B-Instruct"],
    "llama4": ["trl-internal-testing-tiny-Llama4ForCausalLM"],
    "mellum": ["JetBrains-Mellum2-12B-A2.5B-Instruct", "JetBrains-Mellum2-12B-A2.5B-Thinking"],
    "mimo_v2_flash": ["XiaomiMiMo-MiMo-V2-Flash", "XiaomiMiMo-MiMo-V2.5"],
    "minimax_m2": ["MiniMaxAI-MiniMax-M2", "MiniMaxAI-MiniMax-M2.5", "MiniMaxAI-MiniMax-M2.7"],
    "mistral": ["mistralai-Mistral-7B-Instruct-v0.3", "mistralai-Mistral-Small-24B-Instruct-2501",
                "mistralai-Mistral-Nemo-Instruct-2407"],
    "mixtral": ["mixtral-instruct-v0.1*", "mixtral-8x22B-instruct-v0.1*"],
    "nemotron_h": ["NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "nemotron_3_super", "nemotron_3_ultra"],
    "olmoe": ["allenai-OLMoE-1B-7B-0125-Instruct", "allenai-OLMoE-1B-7B-0924-Instruct"],
    "phimoe": ["microsoft-Phi-tiny-MoE-instruct", "microsoft-Phi-3.5-mini-instruct"],
    "qwen2": ["Qwen-Qwen2.5-7B-Instruct", "qwen2-instruct*"],
    "qwen2_moe": ["qwen2-moe-instruct*", "qwen1.5-moe-chat*"],
    "qwen3": ["Qwen-Qwen3-0.6B"],
    "qwen3_5": ["Qwen-Qwen3.5-0.8B", "Qwen-Qwen3.6-35B-A3B"],
    "qwen3_moe": ["Qwen-Qwen3-Coder-30B-A3B-Instruct", "Qwen3-Thinking*", "Qwen3-Instruct*", "qwen3 *"],
    "qwen3_next": ["Qwen-Qwen3-Coder-Next", "Qwen3-Next-Thinking*", "Qwen3-Next-Instruct*"],
    "qwen3_vl": ["Qwen-Qwen3-VL-8B-Instruct", "Qwen-Qwen3-VL-8B-Thinking"],
    "qwen3_vl_moe": ["Qwen3-VL-Instruct*", "Qwen3-VL-Thinking*"],
    "qwen4_exp": ["qwen3.8-Flash-Next*", "qwen3.8 *"],
    "smollm3": ["HuggingFaceTB-SmolLM3-3B", "HuggingFaceTB-SmolLM3-3B@3e0e27"],
    "solar_open": ["upstage-Solar-Open-100B"],
}  # fmt: skip
"""The released templates of each model_type, by the names that `chats.templates` gives them; "*": and a version."""
SWITCHES = {
    "cohere2_moe": {"reasoning_effort": ("none", "high")},
    "hy_v3": {"reasoning_effort": ("no_think", "high")},
    "solar_open": {"reasoning_effort": ("minimal", "high")},
}
"""What a family's templates read to switch reasoning where they do not read `enable_thinking` or `thinking`."""
WEATHER = Tool(
    "get_weather",
    "The weather of a city: <b>now</b> & later.",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "Größe, “name”"},
            "days": {"type": "integer", "minimum": 1},
            "unit": {"type": "string", "enum": ["C", "F"]},
        },
        "required": ["city"],
    },
)
CALL: dict[str, Any] = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"city": "São Paulo's", "days": 3}},
}
RESULT = {"role": "tool", "tool_call_id": "abcdefghi", "name": "get_weather", "content": '{"degrees": 23.5}'}
SYSTEM, ASKED = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "How warm is it?"}
TURNS: Messages = [ASKED, {"role": "assistant", "content": "Where?"}, {"role": "user", "content": "In São Paulo.\n"}]
CALLED: Messages = [SYSTEM, ASKED, {"role": "assistant", "content": "", "tool_calls": [CALL]}, RESULT]
CONVERSATIONS: dict[str, tuple[Messages, bool]] = {
    "system": ([SYSTEM, ASKED], False),
    "turns": (TURNS, False),
    "tools told of": ([ASKED], True),
    "a call and its result": (CALLED, True),
    "a call, its result and more": (
        [*CALLED, {"role": "assistant", "content": "23 degrees."}, {"role": "user", "content": "Thanks!"}],
        True,
    ),
    "a call alone": ([*CALLED[:2], {**CALLED[2], "content": None}, RESULT], True),
    "reasoning": ([ASKED, TURNS[1] | {"reasoning_content": "Which city\nis it?"}, TURNS[2]], False),
}
"""Messages, and whether tools are told of."""


def sweep(folders: Mapping[str, Path], report: Report) -> None:
    """Every family's templates; families without any are named."""
    known = dict(templates(folders, every=True))
    for model_type, wanted in TEMPLATES.items():
        for wish in wanted:
            name = next((name for name in known if fnmatchcase(name.partition(" ")[2], wish)), None)
            if name is None:
                report.wrong(f"{model_type}: no package has the template {wish}")
            else:
                _family(model_type, name, known[name], report)
    without = [name for name in found() if name not in TEMPLATES and not name.endswith("_text")]
    report.note(f"without a released template here: {', '.join(without)}")


def _family(model_type: str, name: str, template: str, report: Report) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        byte_tokenizer(Path(scratch), template)
        tokenizer = load_tokenizer(Path(scratch))
        reference = transformers.PreTrainedTokenizerFast.from_pretrained(scratch)
    chat = chat_format(model_type, tokenizer)
    agreed = report.agreements
    for title, (messages, with_tools) in CONVERSATIONS.items():
        use = Use([WEATHER]) if with_tools and chat.takes_tools else None
        for thinking in (False, True):
            switch = {key: values[thinking] for key, values in SWITCHES.get(model_type, {}).items()}
            settings = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": thinking, **switch}
            settings |= {"thinking": thinking, "tools": [copy.deepcopy(WEATHER.definition)] if use else None}
            try:
                theirs = reference.apply_chat_template(_told(messages, chat), **settings)
            except Exception as error:  # a template can fail in any way Python can
                theirs = f"refused: {error}"
            try:
                ours = tokenizer.decode(encode(chat, tokenizer, messages, thinking=thinking, use=use)[0])
            except InputError as error:
                ours = f"refused: {error}"
            _compare(f"{model_type}, {name}: {title}, thinking={thinking}", ours, theirs, messages, report)
    calls = type(chat.syntax).__name__ if chat.syntax else "no calls"
    tools = "and tools" if chat.takes_tools else "without tools"
    switch = "" if chat.asks_for_reasoning else ", no switch for reasoning"
    agreed = report.agreements - agreed
    report.note(f"{model_type:16} {name:56} {agreed:3} agree; {chat.tags[0]}{switch}; {calls} {tools}")


def _compare(what: str, ours: str, theirs: str, messages: Messages, report: Report) -> None:
    calls = any("tool_calls" in message for message in messages)
    if theirs.startswith("refused") and (calls or ours.startswith("refused")):
        report.set_apart("the template refuses the conversation; calls numoe writes as the model does")
    elif calls and "Paulo" in ours and "Paulo" not in theirs:
        report.set_apart("the template leaves out calls, which numoe writes as the model does")
    else:
        report.compare(what, ours, theirs)


def _told(messages: Messages, chat: ChatFormat) -> Messages:
    """Messages with the id of the call as the model writes it."""
    told = copy.deepcopy(messages)
    made = chat.syntax.told_id("abcdefghi", "get_weather", 0) if chat.syntax else "abcdefghi"
    for message in told:
        for call in message.get("tool_calls", ()):
            call["id"] = made
        if message["role"] == "tool":
            message["tool_call_id"] = made
    return told
