"""Templates that write earlier turns otherwise once others follow, or want something of the turns,
and chats to try them with.

Each behaves as the published templates of a family do, where these are hard to learn from.
"""

from __future__ import annotations

from typing import Any

FAMILIES = {
    # channels of one turn, thoughts of the last turn alone, and another mark at the end of it, as
    # gpt-oss'
    "channels": (
        "{% if messages and messages[0].role == 'system' %}{{ '<|start|>developer<|message|>' +"
        " messages[0].content + '<|end|>' }}{% set messages = messages[1:] %}{% endif %}{% for m in"
        " messages %}{% if m.role == 'assistant' %}{% set final = loop.last and not"
        " add_generation_prompt %}{% if m.thinking and final %}{{"
        " '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif"
        " %}{% if m.tool_calls %}{{ '<|start|>assistant to=functions.' +"
        " m.tool_calls[0].function.name }}{{ '<|channel|>commentary<|message|>' +"
        " (m.tool_calls[0].function.arguments | tojson) + '<|call|>' }}{% else %}{{"
        " '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if final else"
        " '<|end|>') }}{% endif %}{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content +"
        " '<|end|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{%"
        " endif %}"
    ),
    # thoughts behind the last question alone, wherever the row has them, as Qwen3's
    "hidden": (
        "{% set at = namespace(last=-1) %}{% if tools %}{{ '<|im_start|>system\n' + (tools |"
        " tojson) + '<|im_end|>\n' }}{% endif %}{% for m in messages %}{% if m.role == 'user' %}{%"
        " set at.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}{{"
        " '<|im_start|>' + m.role + '\n' }}{% set said = m.content or '' %}{% if m.role =="
        " 'assistant' %}{% set thought = m.reasoning_content or '' %}{% if '</think>' in said %}{%"
        " set thought = said.split('</think>')[0].split('<think>')[-1] %}{% set said ="
        " said.split('</think>')[-1].lstrip('\n') %}{% endif %}{% if loop.index0 > at.last and"
        " (loop.last or thought) %}{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{%"
        " endif %}{{ said }}{% for call in m.tool_calls or [] %}<tool_call>\n{{ call.function.name"
        " }} {{ call.function.arguments | tojson }}\n</tool_call>{% endfor %}{% else %}{{ said }}{%"
        " endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{%"
        " endif %}"
    ),
    # the system text in the last turn of the user, who must begin, as Mistral's v3
    "moving": (
        "{% set system = '' %}{% if messages[0]['role'] == 'system' %}{% set system ="
        " messages[0]['content'] + '\n\n' %}{% set messages = messages[1:] %}{% endif %}{% set"
        " asked = messages | selectattr('role', 'equalto', 'user') | list %}{{ bos_token }}{% for m"
        " in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{"
        " raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}[INST] {{"
        " (system if m == asked[-1] else '') + m.content }}[/INST]{% else %} {{ m.content | trim"
        " }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
    # the same, where it is the last turn of all, as the file of Mistral 7B v0.3 has it
    "moving to the end": (
        "{% set system = '' %}{% if messages[0]['role'] == 'system' %}{% set system ="
        " messages[0]['content'] + '\n\n' %}{% set messages = messages[1:] %}{% endif %}{{"
        " bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0)"
        " %}{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}[INST]"
        " {{ (system if loop.last else '') + m.content }}[/INST]{% else %} {{ m.content | trim }}{{"
        " eos_token }}{% endif %}{% endfor %}"
    ),
    # the prompt opens a thought, and thoughts are written in no turn, as DeepSeek-R1's
    "opened": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content"
        " }}{% elif m.role == 'assistant' %}{{ '<|Assistant|>' + m.content.split('</think>')[-1] +"
        " eos_token }}{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt"
        " %}{{ '<|Assistant|><think>\n' }}{% endif %}"
    ),
    # the same with thoughts behind the last question, as Qwen3's for thinking alone
    "opened and hidden": "",
    # tools in the first turn of the user, calls that end otherwise, and a role for results, as
    # Llama 3's
    "calls": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system ="
        " messages[0]['content'] | trim %}{% set messages = messages[1:] %}{% else %}{% set system"
        " = '' %}{% endif %}{{ '<|start_header_id|>system<|end_header_id|>\n\nToday is ' +"
        " strftime_now('%Y')[:2] + '. ' + system + '<|eot_id|>' }}{% for m in messages %}{% if"
        " m.role == 'assistant' and m.tool_calls %}{% if m.tool_calls | length != 1 %}{{"
        " raise_exception('one call at a time') }}{% endif %}{% set call = m.tool_calls[0].function"
        ' %}{{ \'<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "\' + call.name + \'",'
        " \"parameters\": ' + (call.arguments | tojson) + '}' }}{{ '<|eom_id|>' }}{% elif m.role in"
        " ('tool', 'ipython') %}{{ '<|start_header_id|>ipython<|end_header_id|>\n\n' + (m.content |"
        " tojson) + '<|eot_id|>' }}{% else %}{{ '<|start_header_id|>' + m.role +"
        " '<|end_header_id|>\n\n' }}{% if tools and loop.first %}{{ tools | tojson + '\n\n' }}{%"
        " endif %}{{ m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}{% if"
        " add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%"
        " endif %}"
    ),
}
FAMILIES["opened and hidden"] = FAMILIES["hidden"].replace(
    "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}"
)
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"city": {"type": "string"}}},
}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def thought(n: int) -> dict[str, Any]:
    return said(f"<think>\nI add {n}.\n</think>\n\nThe sum is {n}.")


def call(arguments: Any, content: str | None = None, **more: Any) -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": content,
        **more,
        "tool_calls": [
            {"type": "function", "function": {"name": "weather", "arguments": arguments}}
        ],
    }


SHAPES: dict[str, list[dict[str, Any]]] = {
    "one": [user("Add 2."), thought(2)],
    "three": [user("Add 2."), thought(2), user("Add 3."), thought(5), user("Add 4."), thought(9)],
    "system": [
        {"role": "system", "content": "Be brief."},
        user("Add 2."),
        thought(2),
        user("Add 3."),
        thought(5),
    ],
    "the same twice": [user("Add 2."), thought(2), user("Add 2."), thought(2)],
    "ends with the user": [user("Add 2."), thought(2), user("Thanks!")],
    "begins with the assistant": [said("Yes."), user("Add 2."), thought(2)],
    "a tool": [
        user("Weather in Paris?"),
        call({"city": "Paris"}),
        {"role": "tool", "content": "sunny"},
        thought(7),
    ],
    "a tool, then more": [
        user("Weather?"),
        call({"city": "Paris"}, reasoning_content="I look."),
        {"role": "tool", "content": "sunny"},
        thought(7),
        user("And 2?"),
        thought(2),
    ],
    "a fault that is not learned": [
        user("Add 2."),
        said("The sum is 7.", weight=0),
        user("No."),
        thought(2),
    ],
}
REFUSED = {
    **{
        (family, shape): "roles must alternate"
        for family in ("moving", "moving to the end")
        for shape in ("begins with the assistant", "a tool", "a tool, then more")
    },
    ("opened", "a tool"): "can only concatenate|NoneType|None has no|no attribute",
    ("opened", "a tool, then more"): "can only concatenate|NoneType|None has no|no attribute",
}
"""What a template refuses, and what it says."""
