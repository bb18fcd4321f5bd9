"""Chat templates in Jinja, rendered in a sandbox: no files, no clock, no randomness.

What a template gets is what Hugging Face gives it (`messages`, `tools`, `add_generation_prompt`, the special
tokens, `raise_exception`), but for `strftime_now`: a prompt must not depend on the day it was prepared.
"""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_dynmix.errors import InputError

OPEN, CLOSE = "\U0010fffe", "\U0010ffff"
"""Noncharacters, which no text holds, put around what is in `{% generation %}`."""
_FAILURES = (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError)


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`: what the assistant says."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body, lineno=line)

    def _marked(self, caller: Any) -> str:
        return f"{OPEN}{caller()}{CLOSE}"


class ChatTemplate:
    """A compiled chat template."""

    def __init__(self, source: str) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        del environment.filters["random"], environment.globals["lipsum"]
        environment.globals["raise_exception"] = _raise_exception
        try:
            tree = environment.parse(source)
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise InputError(
                f"the chat template is no Jinja: {error.message} in line {error.lineno}"
            ) from error
        self._names = meta.find_undeclared_variables(tree)
        self.has_generation = any(map(_is_generation, tree.find_all(nodes.CallBlock)))
        self._source = source

    def knows(self, name: str) -> bool:
        """Tell whether the template speaks of ``tools``, ``tool_calls`` or the role ``tool``."""
        return name in self._names if name == "tools" else name in self._source

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        names: Mapping[str, str],
        add_generation_prompt: bool = False,
    ) -> tuple[str, tuple[tuple[int, int], ...]]:
        """Return the text, and the half-open character ranges that are in `{% generation %}`.

        ``messages`` are ``{"role", "content", ...}``, ``tools`` JSON schemas, ``names`` special tokens such
        as ``eos_token``. With ``add_generation_prompt`` the text ends with what an answer starts with. A
        template that refuses the messages, or fails, is an InputError.
        """
        try:
            text = self._template.render(
                messages=list(messages),
                tools=list(tools) or None,
                add_generation_prompt=add_generation_prompt,
                **names,
            )
        except _FAILURES as error:
            raise InputError(f"the chat template refuses the conversation ({error})") from error
        return _spans(text)


@lru_cache(maxsize=8)
def compiled(source: str) -> ChatTemplate:
    """Return the compiled template; one that is no Jinja is an InputError."""
    return ChatTemplate(source)


def _is_generation(block: nodes.CallBlock) -> bool:
    target = block.call.node
    return isinstance(target, nodes.ExtensionAttribute) and target.name == "_marked"


def _spans(marked: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    first, *rest = marked.split(OPEN)
    texts, spans, length = [first], [], len(first)
    for part in rest:
        inside, _, outside = part.partition(CLOSE)
        spans.append((length, length + len(inside)))
        texts += [inside, outside]
        length += len(inside) + len(outside)
    return "".join(texts), tuple(spans)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own escapes what is special in HTML
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
