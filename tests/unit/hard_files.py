"""Files of bad and nasty rows, made on the spot: what stands in them, and what must become of each row.

`good` lines become examples, `bad` ones are counted with their number; a file that `refused` says something
about is refused as a whole, with these words in the message.
"""

import gzip
import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class HardFile:
    content: bytes
    good: tuple[int, ...] = ()
    bad: tuple[int, ...] = ()
    refused: str = ""


def talk(*texts: Any, **extra: Any) -> str:
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return json.dumps({"conversations": turns, **extra}, ensure_ascii=False)


def roles(*pairs: tuple[Any, str], **extra: Any) -> str:
    return json.dumps({"conversations": [{"from": role, "value": text} for role, text in pairs], **extra})


FIRST = talk("What is the capital of France?", "Paris.")
LAST = talk("Add 17 and 25.", "17 + 25 = 42.")


def rows(*bad: str | bytes, bad_lines: tuple[int, ...] | None = None) -> HardFile:
    """Bad rows between two good ones."""
    middle = [row if isinstance(row, bytes) else row.encode() for row in bad]
    content = b"\n".join([FIRST.encode(), *middle, LAST.encode()]) + b"\n"
    lines = content.count(b"\n")
    refused = tuple(range(2, lines)) if bad_lines is None else bad_lines
    return HardFile(content, tuple(n for n in range(1, lines + 1) if n not in refused), refused)


def lines(*good: str, end: str = "\n") -> HardFile:
    return HardFile("".join(row + end for row in good).encode(), tuple(range(1, len(good) + 1)))


def alpaca(**values: Any) -> str:
    return json.dumps(values)


TWO = f"{FIRST}\n{LAST}\n".encode()
BLANKS = f"{FIRST}\n\n \t\n{LAST}\n\n{FIRST}\n".encode()
HARD: dict[str, HardFile] = {
    "01_truncated_json": rows(FIRST[:40]),
    "02_trailing_comma": rows('{"conversations": [{"from": "human", "value": "a"},]}'),
    "04_raw_newline_in_string": rows('{"conversations": [{"from": "human", "value": "a', 'b"}]}'),
    "05_two_objects_on_a_line": rows(FIRST + LAST),
    "06_nan_and_infinity": rows(FIRST[:-1] + ', "x": NaN, "y": Infinity}'),
    "08_duplicate_keys": rows('{"conversations": [], ' + FIRST[1:]),
    "09_empty_file": HardFile(b"", refused="holds no rows"),
    "10_only_blank_lines": HardFile(b"\n \n\t\r\n", refused="holds no rows"),
    "12_crlf": lines(FIRST, LAST, FIRST, end="\r\n"),
    "13_blank_lines_between": HardFile(BLANKS, (1, 4, 6)),
    "14_no_final_newline": HardFile(TWO.rstrip(), (1, 2)),
    "16_utf16_file": HardFile(TWO.decode().encode("utf-16"), refused="iconv"),
    "17_nul_raw_bytes": rows(talk("a", "b~c").replace("~", "\0")),
    "18_nul_escaped": rows(talk("a\0b", "c\0d"), bad_lines=()),
    "20_gzip_named_jsonl": HardFile(gzip.compress(TWO), refused="gunzip"),
    "21_unicode_line_separators": rows(talk("a\u2028b", "c\u2029d\u0085e"), bad_lines=()),
    "22_json_array_file": HardFile(f"[\n{FIRST},\n{LAST}\n]\n".encode(), refused="name it .json"),
    "24_missing_conversations": rows('{"id": 1}'),
    "25_null_conversations": rows('{"conversations": null}'),
    "26_conversations_is_string": rows('{"conversations": "hi"}'),
    "28_empty_conversations": rows('{"conversations": []}'),
    "29_only_system_prompt": rows('{"conversations": [], "system_prompt": "Be brief."}'),
    "30_missing_from": rows('{"conversations": [{"value": "a"}, {"value": "b"}]}'),
    "32_turns_are_strings": rows('{"conversations": ["a", "b"]}'),
    "33_nested_lists": rows('{"conversations": [[{"from": "human", "value": "a"}]]}'),
    "34_value_is_list": rows(talk(["a", ["b"]], "c")),
    "36_role_not_string": rows(roles((1, "a"), (2, "b")), roles((None, "a"), ("gpt", "b"))),
    "37_system_prompt_not_string": HardFile(
        "\n".join([
            FIRST, *(talk("a", "b", system_prompt=value) for value in (5, ["x"], {"x": 1}, None, ""))
        ]).encode(),
        (1, 5, 6),
        (2, 3, 4),
    ),
    "38_two_gpt_in_a_row": rows(roles(("human", "a"), ("gpt", "b"), ("gpt", "c"))),
    "40_starts_with_gpt": rows(roles(("gpt", "a"), ("human", "b"), ("gpt", "c")), roles(("gpt", "a"))),
    "41_no_trainable_turn": rows(talk("a"), talk("a", "b", "c")),
    "42_empty_assistant": rows(talk("a", ""), talk("a", " \n"), talk("a", "b", "c", "")),
    "44_unknown_roles": rows(
        roles(("human", "a"), ("tool", "b"), ("gpt", "c")),
        roles(("human", "a"), ("function_call", "{}"), ("observation", "ok"), ("gpt", "c")),
        roles(("Human", "a"), ("GPT", "b")),
        roles(("user", "a"), ("assistant", "b")),
        roles(("", "a"), ("gpt", "b")),
        # OpenAI's names in ShareGPT's shape say the same thing
        bad_lines=(2, 3, 4, 6),
    ),
    "45_system_as_turn": rows(
        roles(("system", "s"), ("human", "a"), ("gpt", "b")),
        roles(("human", "a"), ("system", "s"), ("gpt", "b")),
        roles(("system", "s"), ("human", "a"), ("gpt", "b"), system_prompt="t"),
        roles(("system", "s")),
        bad_lines=(3, 4, 5),
    ),
    # as long as they are, these are examples: how long one may be is the packing's to say
    "46_huge_answer_200k": rows(talk("a", "word " * 40_000), bad_lines=()),
    "48_one_word_200k": rows(talk("a", "x" * 200_000), bad_lines=()),
    "49_2000_turns": rows(talk(*["ab", "cd"] * 1000), bad_lines=()),
    "50_special_tokens_in_text": lines(
        talk("What is </s>? <|im_end|>\n<|im_start|>assistant\nhm", "</s> [INST] <pad> <s>"),
        talk("USER: hi ASSISTANT: hello", "### Human: fake"),
    ),
    # a row that says of its only answer that it is not trained on trains nothing
    "52_extra_keys": HardFile(
        "\n".join([
            talk("a", "b", id=7, meta={"a": [1, 2]}),
            FIRST.replace('"Paris."', '"Paris.", "weight": 0'),
        ]).encode(),
        (1,),
        (2,),
    ),
    "53_exact_duplicates": lines(FIRST, FIRST, LAST, FIRST),
    "54_mixed_formats": HardFile(
        "\n".join([
            FIRST,
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
            alpaca(instruction="a", input="", output="b"),
            alpaca(prompt="a", response="b"),
        ]).encode(),
        (1,),
        (2, 3, 4),
    ),
    "56_alpaca_bad": HardFile(
        "\n".join([
            alpaca(instruction="a", input="", output="b"),
            alpaca(instruction="a", output="b"),
            alpaca(instruction="a", input="", output=""),
            alpaca(instruction="", input="", output="b"),
            alpaca(instruction="a", input=""),
            alpaca(instruction="a", input=None, output="b"),
            alpaca(instruction=5, input="", output="b"),
            alpaca(instruction="a", input="", output=["b"]),
        ]).encode(),
        (1, 2, 6),
        (3, 4, 5, 7, 8),
    ),
}  # fmt: skip
