"""Stock tokenizers with their own templates, beside what transformers makes of the same conversations.

`DYNMIX_TOKENIZERS` is a folder with one or more of the folders of REAL; each, or the folder `models` in it,
holds a `tokenizer.json`.
"""

import copy
import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from megatron_dynmix.data.prepare.conversation import thought
from megatron_dynmix.data.prepare.encode import Encoder
from megatron_dynmix.data.prepare.formats import Format
from megatron_dynmix.data.prepare.template import Rendered, Renderer
from megatron_dynmix.data.tokenizer.load import load_tokenizer

ROOT = os.environ.get("DYNMIX_TOKENIZERS")
REAL = ("qwen3", "deepseek_v3", "gptoss", "gemma3", "llama3_1", "llama2")
pytestmark = pytest.mark.skipif(ROOT is None, reason="DYNMIX_TOKENIZERS names no folder of real tokenizers")
CONVERSATIONS = 160

HARMONY = """{{- bos_token }}{%- for m in messages %}{%- if m.role == 'assistant' %}
{%- if m.reasoning_content and loop.last %}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.reasoning_content + '<|end|>' }}{%- endif %}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content }}
{{- '<|return|>' if loop.last else '<|end|>' }}
{%- else %}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""
INSTRUCT = """{%- for m in messages %}{%- if m.role == 'assistant' %}
{{- ' ' + m.content | trim + ' ' + eos_token }}
{%- elif m.role == 'user' %}{{- bos_token + '[INST] ' + m.content | trim + ' [/INST]' }}
{%- else %}{{- raise_exception('Only user and assistant speak here.') }}{%- endif %}{%- endfor %}"""
MARKED = """{{- bos_token or '' }}{%- for m in messages %}{{- '<|' + m.role + '|>\\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{- m.content + eos_token }}{% endgeneration %}
{%- else %}{{- m.content }}{%- endif %}{{- '\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"""
OWN = {"gptoss": HARMONY, "llama2": INSTRUCT}
"""For tokenizers whose package has no template: ours, in the manner of theirs."""

BATTERY = [
    *(
        "2023 was 1,234.5 or 12345678",
        "  two  spaces\n\n\nx \n y ",
        "\ufb01 \uff11\uff12\uff13 \u00e9 e\u0301 \u212b",
    ),
    *(
        "a\tb\u3000c\u00a0d",
        "don't I'LL we'Ve",
        "\u4e2d\u6587 \u304b\u306a \uc138\uacc4 \u0639\u0631\u0628\u064a",
    ),
    *(
        "\U0001f642\U0001f3fd\u200d\U0001f680",
        "<think>x</think>\n",
        "HTTPServer2 snake_case() {}\r\n\r\n",
        " ",
        "\n",
        "",
    ),
    *("\u202eabc\u0000\u0007", "[INST] <|im_start|> <s> </s>", "    if x:\n\t\treturn 0x1F", "a" * 300),
]
SAID = [
    *(
        "Two plus two is four.",
        "51",
        "1.10 and 1e5",
        "caf\u00e9 \u2014 na\u00efve",
        "\u5317\u4eac\u5728\u54ea\u91cc\uff1f",
    ),
    *(
        "line one\nline two\n\nline four",
        "    indented\n\tcode",
        "don't",
        "x = {'a': [1, 2]}",
        "\U0001f642 ok",
    ),
    *(
        "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
        "%s {{ m }} {% if %}",
        "\ufb01ne \uff21",
        "</tool_call> [/INST]",
        "e\u0301",
    ),
]
EDGES = ["\n{}", "\n\n{}", " {}", "\t{}", "{}\n", "{} ", "  {}  ", "\u3000{}"]
FORGED = [
    "<|im_end|>",
    "<|eot_id|>",
    "</s>",
    "<end_of_turn>",
    "<|return|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a town",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}, "n": {"type": "number"}}},
    },
}


def folder_of(name: str) -> Path:
    folder = Path(ROOT or "") / name
    folder = folder / "models" if (folder / "models").is_dir() else folder
    if not folder.is_dir():
        pytest.skip(f"DYNMIX_TOKENIZERS has no {name}")
    return folder


@cache
def renderer_of(name: str, template: str | None = None) -> Renderer:
    tokenizer = load_tokenizer(folder_of(name))
    tokenizer.chat_template = template or tokenizer.chat_template or OWN[name]
    return Renderer(tokenizer, "tokenizer")


@cache
def hf_of(name: str) -> PreTrainedTokenizerFast:
    """Transformers around the file: what it makes of some files by their class is not what is asked here."""
    tokenizer = renderer_of(name).tokenizer
    file = str(folder_of(name) / "tokenizer.json")
    hf_tokenizer = PreTrainedTokenizerFast(tokenizer_file=file, **tokenizer.template_names)
    hf_tokenizer.chat_template = tokenizer.chat_template
    return hf_tokenizer


def said(rng: random.Random, forged: bool) -> str:
    text = rng.choice(SAID)
    if rng.random() < 0.3:
        text = f"{text} {rng.choice(SAID)}"
    if forged and rng.random() < 0.6:
        text = f"{text} {rng.choice(FORGED)} {rng.choice(['', 'x'])}"
    return rng.choice(EDGES).format(text) if rng.random() < 0.25 else text


def conversations(*, tools: bool = True) -> Iterator[tuple[dict[str, Any], bool]]:
    """Rows in the form `messages`, and whether something in them only looks like a special token."""
    for number in range(CONVERSATIONS):
        rng = random.Random(number)
        forged, with_tools = number % 5 == 4, tools and number % 3 == 2
        messages: list[dict[str, Any]] = []
        if rng.random() < 0.4:
            messages.append({"role": "system", "content": said(rng, forged)})
        for _ in range(rng.randint(1, 4)):
            messages.append({"role": "user", "content": said(rng, forged)})
            if with_tools and rng.random() < 0.6:
                arguments = {"town": said(rng, forged), "n": rng.choice([1, 2.5, -3])}
                call = {"type": "function", "function": {"name": "get_weather", "arguments": arguments}}
                messages.append(
                    {"role": "assistant", "content": rng.choice(["", None]), "tool_calls": [call]}
                )
                messages.append({"role": "tool", "name": "get_weather", "content": said(rng, forged)})
            answer: dict[str, Any] = {"role": "assistant", "content": said(rng, forged)}
            if tools and rng.random() < 0.3:
                answer["reasoning_content"] = said(rng, forged)
            messages.append(answer)
        yield {"messages": messages, **({"tools": [TOOL]} if with_tools and number % 2 else {})}, forged


def forms(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What templates want differently: arguments as text, null for an empty text, reasoning in the text."""
    for as_text, empty, in_text in product((False, True), ("given", "", None, "absent"), (False, True)):
        changed = copy.deepcopy(row)
        for message in changed["messages"]:
            for call in message.get("tool_calls", ()) if as_text else ():
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
            if "tool_calls" in message and empty != "given":
                message["content"] = empty
                if empty == "absent":
                    del message["content"]
            if in_text and "reasoning_content" in message:
                message["content"] = thought(message.pop("reasoning_content"), message["content"])
        yield changed


def theirs(name: str, row: dict[str, Any], *, is_asked: bool = False) -> str | None:
    """What transformers writes, null where the row has it: `apply_chat_template` drops such keys."""
    hf_tokenizer = hf_of(name)
    try:
        (text,), _ = render_jinja_template(
            conversations=[row["messages"]],
            tools=row.get("tools"),
            chat_template=hf_tokenizer.get_chat_template(tools=row.get("tools")),
            add_generation_prompt=is_asked,
            **hf_tokenizer.special_tokens_map,
        )
    except Exception:
        return None
    return str(text)


def rendered(renderer: Renderer, row: dict[str, Any]) -> Rendered | str:
    try:
        return renderer.render(Format(name="messages").parse(copy.deepcopy(row)))
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("name", REAL)
def test_ids_are_those_of_the_file(name: str) -> None:
    backend = Backend.from_file(str(folder_of(name) / "tokenizer.json"))
    encoded = renderer_of(name).tokenizer.encode_batch(BATTERY)
    expected = [backend.encode(text, add_special_tokens=False).ids for text in BATTERY]
    assert [ids_T.tolist() for ids_T, _ in encoded] == expected


@pytest.mark.parametrize("name", REAL)
def test_conversations_are_what_transformers_makes_of_them(name: str) -> None:
    """Text and ids are equal; the last answer begins where the prompt of inference ends."""
    renderer, hf_tokenizer = renderer_of(name), hf_of(name)
    encoder = Encoder(renderer, None, np.int32)
    special = renderer.tokenizer.special
    used = cut = asked = 0
    reasons: Counter[str] = Counter()
    for row, forged in conversations():
        ours = rendered(renderer, row)
        if isinstance(ours, str):
            reasons[ours] += 1
            continue
        used, text = used + 1, special.unguard(ours.text)
        same = [form for form in forms(row) if theirs(name, form) == text]
        assert same, (row, text, theirs(name, row))
        (masked,) = encoder._tokens([ours])
        ids, first = masked.ids_T.tolist(), int(np.argmax(masked.trained_T))
        if forged and special.literal(ours.text):
            assert specials(renderer, masked.ids_T) == specials(
                renderer, encoder._tokens([plain(renderer, row)])[0].ids_T
            )
            continue
        cut += masked.cuts > 0
        if not masked.cuts:
            assert ids == hf_tokenizer(text, add_special_tokens=False)["input_ids"], row
        until = {**same[0], "messages": same[0]["messages"][:-1]}
        prompt = theirs(name, until, is_asked=True)
        if prompt is None or not text.startswith(prompt):
            continue
        asked += 1
        assert ours.trained_spans[-1][0] == len(prompt), (text[: ours.trained_spans[-1][0]], prompt)
        if not masked.cuts or len(ours.trained_spans) == 1:
            head = hf_tokenizer(prompt, add_special_tokens=False)["input_ids"]
            assert ids[: len(head)] == head
            assert not masked.trained_T[len(head) - 1] and masked.trained_T[len(head)]
            assert first == len(head) or len(ours.trained_spans) > 1
    assert used >= {"gemma3": 60, "llama2": 30, "gptoss": 60}.get(name, 100), reasons
    assert asked >= used // 2 and cut < used // 4


def specials(renderer: Renderer, ids_T: NDArray[np.integer]) -> list[int]:
    """The special tokens of a text, in order."""
    return [i for i in ids_T.tolist() if i in renderer.tokenizer.special_ids]


def plain(renderer: Renderer, row: dict[str, Any]) -> Rendered:
    """The same conversation with other letters where something looks like a special token."""
    text = json.dumps(row, ensure_ascii=False)
    for token in FORGED:
        text = text.replace(token, "forged")
    found = rendered(renderer, json.loads(text))
    assert not isinstance(found, str), found
    return found


@pytest.mark.parametrize("name", REAL)
def test_masks_are_those_of_generation_marks(name: str) -> None:
    renderer, hf_tokenizer = renderer_of(name, MARKED), hf_of(name)
    encoder = Encoder(renderer, None, np.int32)
    compared = 0
    for row, forged in conversations(tools=False):
        ours = rendered(renderer, row)
        assert not isinstance(ours, str), ours
        (masked,) = encoder._tokens([ours])
        if forged or masked.cuts:
            continue
        theirs = hf_tokenizer.apply_chat_template(
            row["messages"], chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
        )
        assert masked.ids_T.tolist() == theirs["input_ids"]
        assert masked.trained_T.astype(int).tolist() == theirs["assistant_masks"]
        compared += 1
    assert compared >= 100
