"""DeepSeek-V4's conversation format, which its authors ship as a program instead of a Jinja template.

    <BOS>{system}<｜User｜>{user}<｜Assistant｜><think>{reasoning}</think>{answer}{tool calls}<EOS><｜User｜>...

`</think>` alone follows <｜Assistant｜> where there is no reasoning. Tool results are user text in <tool_result>
tags; tool calls are written in DSML. Source: the description of the encoding in the released repositories.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Self

from numoe.engine.chat.format import ChatFormat
from numoe.engine.chat.thinking import ThinkSplitter, split_thinking
from numoe.engine.chat.tools.call import ANY_TOOL
from numoe.engine.chat.tools.reader import read_calls
from numoe.engine.chat.tools.syntaxes import syntax_of
from numoe.engine.text.tags import DSML
from numoe.engine.text.tokenizer import Tokenizer
from numoe.quant.documents import parse_json
from numoe.quant.errors import InputError

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT, REMINDER = "<｜User｜>", "<｜Assistant｜>", "<｜latest_reminder｜>"
THINK, END_THINK = "<think>", "</think>"

# A message's "task" asks for one short answer of a fixed kind instead of a reply.
TASKS = {
    "action": "<｜action｜>",
    "query": "<｜query｜>",
    "authority": "<｜authority｜>",
    "domain": "<｜domain｜>",
    "title": "<｜title｜>",
    "read_url": "<｜read_url｜>",
}

MAX_EFFORT = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root "
    "cause, rigorously stress-testing your logic against all potential paths, edge cases, and adversarial "
    "scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, considered "
    "alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.\n\n"
)

TOOLS = """## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a \
"<｜DSML｜tool_calls>" block like the following:

<｜DSML｜tool_calls>
<｜DSML｜invoke name="$TOOL_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$TOOL_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, \
arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning inside \
<think>...</think> BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

%s

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""


def encode(
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking: bool = False,
    reasoning_effort: str | None = None,
    add_generation_prompt: bool = True,
) -> str:
    """The prompt for a conversation of OpenAI-style messages.

    Roles: system, user, assistant, tool, and latest_reminder and developer (a user message that may bring tools).
    tools: go with the system message; a message's own "tools" do the same for a system or developer message.
    thinking: reasoning of turns before the last user message is left out, unless there are tools.
    reasoning_effort: "max" puts a fixed paragraph first when thinking; None and "high" add nothing.
    add_generation_prompt: end with the beginning of the next answer.
    Raises InputError naming what of a message or option cannot be written.
    """
    if reasoning_effort not in (None, "high", "max"):
        raise InputError(f"Reasoning effort {reasoning_effort!r} is not one of DeepSeek-V4's; use 'high' or 'max'.")
    turns = _turns(messages, tools)
    keeps_reasoning = any(turn.get("tools") for turn in turns)
    last_user = max((i for i, turn in enumerate(turns) if turn["role"] in ("user", "developer")), default=-1)
    parts = [BOS, MAX_EFFORT if thinking and reasoning_effort == "max" else ""]
    previous: Mapping[str, Any] = {"role": "start"}
    for i, turn in enumerate(turns):
        reasons = thinking and (keeps_reasoning or i > last_user)
        if turn["role"] == "assistant":
            parts += [_opening(previous, thinking, reasons), _assistant(turn, reasons and not previous.get("task"))]
        else:
            prefix = {"system": "", "latest_reminder": REMINDER}.get(turn["role"], USER)
            parts += [prefix, _join(turn["blocks"])]
            if turn.get("tools"):
                parts.append("\n\n" + TOOLS % "\n".join(_json(_function(tool)) for tool in turn["tools"]))
        previous = turn
    if add_generation_prompt:
        opening = _opening(previous, thinking, thinking)
        if not opening:
            raise InputError("The last message is not from the user or a tool, so there is nothing to answer.")
        parts.append(opening)
    return "".join(parts)


def _turns(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """Messages with their content as "blocks": neighbouring user and tool messages are one turn.

    A block is (order, text): the place of the call that a tool result answers, None for what someone wrote.
    """
    if not messages:
        raise InputError("There are no messages; give at least one from the user.")
    turns: list[dict[str, Any]] = []
    call_order: dict[str, int] = {}
    for message in messages:
        role = message.get("role")
        if role not in ("system", "user", "assistant", "tool", "latest_reminder", "developer"):
            raise InputError(f"A message has the role {role!r}, which DeepSeek-V4's format does not know.")
        order, text = None, _text(message.get("content"))
        if role == "assistant":
            calls = message.get("tool_calls") or []
            call_order = {call.get("id", ""): i for i, call in enumerate(calls)}
        if role == "tool":
            order = call_order.get(message.get("tool_call_id", ""), 0)
            role, text = "user", f"<tool_result>{text}</tool_result>"
        joins = role == "user" and turns and turns[-1]["role"] == "user" and not turns[-1].get("task")
        if joins:
            turns[-1]["blocks"].append((order, text))
            turns[-1]["task"] = message.get("task")
        else:
            turns.append({**message, "role": role, "blocks": [(order, text)]})
        if (task := message.get("task")) and task not in TASKS:
            raise InputError(f"A message has the task {task!r}; known are {', '.join(TASKS)}.")
    if tools:
        if turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "blocks": []})
        turns[0]["tools"] = tools
    return turns


def _join(blocks: Sequence[tuple[int | None, str]]) -> str:
    """The text of (order, text) blocks. Tool results stand in the order of the calls they answer."""
    results = iter(sorted((block for block in blocks if block[0] is not None), key=lambda block: block[0] or 0))
    return "\n\n".join(text if order is None else next(results)[1] for order, text in blocks)


def _text(content: Any) -> str:
    """Content is a string, nothing, or OpenAI's list of parts, of which only text can be written."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content):
        return "\n\n".join(part["text"] for part in content)
    raise InputError("A message has content other than text; this model reads text only.")


def _opening(previous: Mapping[str, Any], thinking: bool, reasons: bool) -> str:
    """What stands between a turn and the answer to it; "" if the turn does not ask for one."""
    task = previous.get("task")
    if task == "action":
        return ASSISTANT + (THINK if thinking else END_THINK) + TASKS[task]
    if task:
        return TASKS[task]
    if previous["role"] in ("user", "developer"):
        return ASSISTANT + (THINK if reasons else END_THINK)
    return ""


def _assistant(turn: Mapping[str, Any], reasons: bool) -> str:
    reasoning = (turn.get("reasoning_content") or "") + END_THINK if reasons else ""
    calls = "\n".join(_invocation(call) for call in turn.get("tool_calls") or [])
    block = f"\n\n<{DSML}tool_calls>\n{calls}\n</{DSML}tool_calls>" if calls else ""
    return reasoning + _join(turn["blocks"]) + block + EOS


def _invocation(call: Mapping[str, Any]) -> str:
    function = _function(call)
    name, arguments = function.get("name"), function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments, "what it has")
        except InputError as error:
            raise InputError(f"The arguments of the tool call {name!r} are not valid JSON ({error}).") from error
    if not isinstance(arguments, Mapping):
        raise InputError(f"The arguments of the tool call {name!r} are not a JSON object.")
    parameters = "\n".join(
        f'<{DSML}parameter name="{key}" string="{"true" if isinstance(value, str) else "false"}">'
        f"{value if isinstance(value, str) else _json(value)}</{DSML}parameter>"
        for key, value in arguments.items()
    )
    return f'<{DSML}invoke name="{name}">\n{parameters}\n</{DSML}invoke>'


def _function(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    function = entry.get("function")
    if not isinstance(function, Mapping):
        raise InputError('A tool or tool call has no "function" object; write it as in OpenAI\'s API.')
    return function


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


class DeepSeekV4Chat(ChatFormat):
    """Of models that come without a template, for the format is none."""

    tags = (THINK, END_THINK)
    syntax = syntax_of(f"<{DSML}tool_calls>", ())
    takes_tools = True

    @classmethod
    def of(cls, model_type: str, template: str, tokenizer: Tokenizer) -> Self | None:
        return cls() if model_type == "deepseek_v4" and not template.strip() else None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = False,
        reasoning_effort: str | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        return encode(
            messages,
            tools=tools,
            thinking=thinking,
            reasoning_effort=reasoning_effort,
            add_generation_prompt=add_generation_prompt,
        )

    def parse(self, completion: str, *, thinking: bool) -> dict[str, Any]:
        splitter = ThinkSplitter(thinking, self.tags)
        reasoning, answer = split_thinking(completion.removesuffix(EOS), splitter)
        assert self.syntax is not None
        content, calls = read_calls(answer, self.syntax, ANY_TOOL)
        tool_calls = [{"type": "function", "function": {"name": c.name, "arguments": c.arguments}} for c in calls]
        return {"content": content, "reasoning_content": reasoning, "tool_calls": tool_calls}


FORMAT = DeepSeekV4Chat
