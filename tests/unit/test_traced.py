import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dynmix.data.prepare.traced import (
    ArgumentsObject,
    ArgumentsText,
    Traced,
    joined,
    to_json,
    traced,
    with_marks,
    without_marks,
)
from megatron_dynmix.files import Number

TEXTS = st.text(alphabet='ab </think>\n"\\é😀', max_size=12)
SOURCES = ["a <think>b</think> a\n", '  bb\\n"é ', "", "aaaa"]


def known(text: str) -> list[tuple[str, str]]:
    """Each run as it stands in the text, and as it stood in its part."""
    runs = traced(text).runs
    assert all(before.end <= after.start for before, after in pairwise(runs))
    return [
        (str(text)[run.start : run.end], SOURCES[run.part][run.source_start : run.source_end]) for run in runs
    ]


OPERATIONS = {
    "strip": lambda s, x: s.strip(x or None),
    "lstrip": lambda s, x: s.lstrip(x or None),
    "rstrip": lambda s, x: s.rstrip(x or None),
    "split": lambda s, x: s.split(x or None)[-1] if s.split(x or None) else "",
    "rsplit": lambda s, x: (s.rsplit(x or None, 1) or [""])[0],
    "splitlines": lambda s, x: (s.splitlines() or [""])[-1],
    "partition": lambda s, x: s.partition(x or " ")[2],
    "rpartition": lambda s, x: s.rpartition(x or " ")[0],
    "replace": lambda s, x: s.replace(x, "<>"),
    "removeprefix": lambda s, x: s.removeprefix(x),
    "removesuffix": lambda s, x: s.removesuffix(x),
    "slice": lambda s, x: s[1 : len(x)],
    "behind": lambda s, x: s[-3:],
    "first": lambda s, x: s[0] if s else s,
    "add": lambda s, x: x + s + x,
    "join": lambda s, x: s.join([x, s, x]),
    "chars": lambda s, x: joined(iter(s)),
}


@given(
    part=st.sampled_from(range(4)),
    steps=st.lists(st.tuples(st.sampled_from(sorted(OPERATIONS)), TEXTS), max_size=5),
)
def test_operations_do_as_those_of_a_text_and_keep_origins(part: int, steps: list[tuple[str, str]]) -> None:
    here: str = Traced.part(SOURCES[part], part)
    plain = SOURCES[part]
    for name, other in steps:
        here, plain = OPERATIONS[name](here, other), OPERATIONS[name](plain, other)
        assert here == plain and len(here) == len(plain) and bool(here) == bool(plain)
        assert all(text == source for text, source in known(here))
    assert str(here) == plain


def test_what_is_cut_out_is_known_where_it_stands() -> None:
    whole = Traced.part(SOURCES[0], 0)
    answer = "<|start|>" + whole.split("</think>")[-1].strip() + "<|end|>"
    assert known(answer) == [("a", "a")]
    assert traced(answer).runs[0][:4] == (9, 10, 0, 19)
    assert known(whole.upper()) == []
    # the second piece stands in the separator, too
    assert [piece.runs[0].source_start for piece in Traced.part("x,aa,a", 0).split("a,")] == [0, 5]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


@given(
    value=JSON,
    indent=st.sampled_from([None, 0, 2, "\t"]),
    separators=st.sampled_from([None, (",", ":")]),
    ensure_ascii=st.booleans(),
    sort_keys=st.booleans(),
)
def test_json_is_that_of_the_library(value, indent, separators, ensure_ascii, sort_keys) -> None:
    settings = {
        "indent": indent,
        "separators": separators,
        "ensure_ascii": ensure_ascii,
        "sort_keys": sort_keys,
    }
    assert to_json(value, **settings) == json.dumps(value, **settings)


def test_json_keeps_digits_and_origins() -> None:
    assert (
        to_json([Number("1.10"), Number("1e5"), 12345678901234567890]) == "[1.10, 1e5, 12345678901234567890]"
    )
    text = to_json({"a": Traced.part(SOURCES[1], 1)})
    assert text == '{"a": "  bb\\\\n\\"é "}'
    assert known(text) == [("  bb", "  bb"), ("\\\\", "\\"), ("n", "n"), ('\\"', '"'), ("é ", "é ")]


def test_arguments_as_json_belong_to_them_with_all_their_brackets() -> None:
    arguments = ArgumentsObject({"x": 2, "y": Traced.part("aa", 3)})
    arguments.part = 2
    text = to_json([{"arguments": arguments}])
    (first, *_, last), said = traced(text).runs, '{"x": 2, "y": "aa"}'
    assert text[first.start : last.end] == said
    with pytest.raises(ValueError, match="in quotes"):
        to_json({"arguments": ArgumentsText("{}")})


def test_marks_stand_inside_of_white_space_and_are_taken_out() -> None:
    parts = [" four\n", "a\nb"]
    marked = f"<{with_marks(parts[0], 0)}|{json.dumps(with_marks(parts[1], 1), ensure_ascii=False)}>"
    text = without_marks(traced(marked), parts)
    assert text == '< four\n|"a\\nb">'
    assert [(text.plain[run.start : run.end], run.part) for run in text.runs] == [("four", 0), ("a\\nb", 1)]
    changed = without_marks(traced(with_marks("four", 0).upper()), ["four"])
    assert changed == "FOUR" and [run.source_end for run in changed.runs] == [0]
