"""Chat templates in Jinja, rendered in a sandbox: no files, no clock, no randomness.

What a template gets is what Hugging Face gives it (`messages`, `tools`, `add_generation_prompt`, the special
tokens, `raise_exception`), but for `strftime_now`: a prompt must not depend on the day it was prepared. What
it writes of traced texts (see ``traced.py``) is traced.
"""

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_dynmix.config.run_config import RESERVED
from megatron_dynmix.data.prepare.traced import (
    ArgumentsObject,
    Span,
    Traced,
    joined,
    to_json,
    traced,
    without_marks,
)
from megatron_dynmix.errors import InputError

OPEN, CLOSE = "\U0010fffe", "\U0010ffff"
"""Noncharacters, which no text holds, put around what is in `{% generation %}`."""
_MARKS = re.compile(f"[{OPEN}{CLOSE}]")
_CLOCK = "strftime_now"
_OWN = {*RESERVED, "raise_exception", _CLOCK}

_FAILURES = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


class Refused(ValueError):
    """A template does not take a conversation as it is given."""


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`: what the assistant says."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body, lineno=line)

    def _marked(self, caller: Callable[[], str]) -> str:
        return joined((OPEN, caller(), CLOSE))


class _TracingCode(CodeGenerator):
    """Compiles ``a ~ b`` to what keeps the origin of both."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat(map(str, map(environment.finalize, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))))")


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _TracingCode

    concat = staticmethod(joined)


class ChatTemplate:
    """A compiled chat template."""

    def __init__(self, source: str) -> None:
        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, finalize=_written, extensions=[_Generation, loopcontrols]
        )
        environment.filters |= {
            "tojson": to_json,
            "string": lambda value: str(_written(value)),
            "trim": lambda value, chars=None: str(_written(value)).strip(chars),
            "join": _join,
        }
        del environment.filters["random"], environment.globals["lipsum"]
        environment.globals["raise_exception"] = _raise_exception
        try:
            tree = environment.parse(source)
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise InputError(
                f"the chat template is no Jinja: {error.message} in line {error.lineno}"
            ) from error
        asked = (test.node for test in tree.find_all(nodes.Test) if test.name in ("defined", "undefined"))
        # what a template sets itself where it is not defined is no undeclared variable to Jinja
        defaults = {node.name for node in asked if isinstance(node, nodes.Name)}
        self.variables = frozenset(meta.find_undeclared_variables(tree) | defaults) - _OWN
        """What it reads beside the conversation."""
        self.reads_tools = "tools" in meta.find_undeclared_variables(tree)
        self.has_generation = any(map(_is_generation, tree.find_all(nodes.CallBlock)))
        self._words = {node.attr for node in tree.find_all(nodes.Getattr)}
        self._words |= {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}

    def knows(self, key: str) -> bool:
        """Tell whether the template speaks of this key of a message."""
        return key in self._words

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        names: Mapping[str, Any],
        add_generation_prompt: bool = False,
        marked: Sequence[str] = (),
    ) -> tuple[Traced, tuple[Span, ...]]:
        """Return the text, and the half-open character ranges that are in `{% generation %}`.

        ``messages`` are ``{"role", "content", ...}``, ``tools`` JSON schemas, ``names`` the special tokens,
        such as ``eos_token``, and what else the template reads. With ``add_generation_prompt`` the text ends
        with what an answer starts with. ``marked`` are the texts of all parts where some have marks in the
        place of a trace. A template that does not take the messages, or fails, raises `Refused`.
        """
        try:
            text = self._template.render(
                names,
                messages=list(messages),
                tools=list(tools) or None,
                add_generation_prompt=add_generation_prompt,
            )
        except _FAILURES as error:
            hint = "; give a day: template_date: 2026-01-31" if _CLOCK in str(error) else ""
            raise Refused(f"the chat template refuses the conversation ({error}){hint}") from error
        return _spans(without_marks(traced(text), marked) if marked else traced(text))


@lru_cache(maxsize=8)
def compiled(source: str) -> ChatTemplate:
    """Return the compiled template; one that is no Jinja is an InputError."""
    return ChatTemplate(source)


def _is_generation(block: nodes.CallBlock) -> bool:
    target = block.call.node
    return isinstance(target, nodes.ExtensionAttribute) and target.name == "_marked"


def _spans(marked: Traced) -> tuple[Traced, tuple[Span, ...]]:
    marks = [match.start() for match in _MARKS.finditer(marked)]
    borders = [at - before for before, at in enumerate(marks)]
    runs = (run.moved(-bisect_left(marks, run.start)) for run in marked.runs)
    text = Traced.of(_MARKS.sub("", marked.plain), runs) if marks else marked
    return text, tuple(zip(borders[::2], borders[1::2], strict=True))


def _written(value: Any) -> Any:
    """Return what is written, if that is what the row says: Python's words for other things are not."""
    if value is None or isinstance(value, ArgumentsObject):
        name = "null" if value is None else "the object of a call's arguments"
        raise jinja2.TemplateError(f"it takes {name} for a text")
    return value


@jinja2.pass_environment
def _join(
    environment: jinja2.Environment, pieces: Iterable[Any], separator: str = "", attribute: str | None = None
) -> str:
    if attribute is not None:
        pieces = map(make_attrgetter(environment, attribute), pieces)
    return Traced(separator).join([str(_written(piece)) for piece in pieces])


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
