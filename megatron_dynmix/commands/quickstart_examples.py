"""Generators of small, learnable instruction examples for the quickstart sources.

`math` and `math_again` share one generator. They are redundant on purpose: a strategy that sees redundancy
should lower both.
"""

# ruff: noqa: SIM905 (a list of words reads best as words)

import random
from collections.abc import Callable

Turns = list[str]  # human, gpt, human, gpt, ...

NAMES = "Anna Ben Clara David Emma Felix Grace Hugo Ida Jonas Kira Leon Maya Noah Olga Paul Rosa Sam".split()
GREETINGS = ["Hello,", "Good morning,", "Good evening,", "Hi there,"]
SYSTEM_PROMPT = "You are a polite and helpful assistant."
OCCASIONS = [
    *("a birthday", "a picnic", "a wedding", "a rainy Sunday", "a long train ride", "a garden party"),
    *("a quiet evening", "a day at the sea", "a visit of old friends", "the first day at work"),
]
IDEAS = {
    "a gift": ["a good book", "a box of fine tea", "fresh flowers", "a small plant"],
    "a meal": ["a warm soup", "a pasta with basil", "a lemon cake", "a green salad"],
    "a game": ["a card game", "a round of chess", "a word puzzle", "a treasure hunt"],
    "some music": ["a calm piano piece", "a cheerful folk song", "a slow waltz", "an old jazz record"],
    "an outfit": ["a light blue shirt", "a warm coat", "comfortable shoes", "a simple dress"],
    "a drink": ["a cold lemonade", "a pot of mint tea", "a glass of apple juice", "a hot chocolate"],
}

ITEMS = "apples books coins eggs flowers marbles oranges pencils shells stamps".split()
UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()

LISTS = "ages costs dates grades lengths levels marks prices ranks scores sizes speeds times weights".split()
FILES = ["access.log", "errors.log", "notes.txt", "people.csv", "sales.csv", "stock.csv", "words.txt"]
PYTHON_TASKS = [
    ("returns the first {n} {x}", "def first_{n}_{x}({x}):\n    return {x}[:{n}]"),
    ("adds up the first {n} {x}", "def sum_{n}_{x}({x}):\n    return sum({x}[:{n}])"),
    ("finds the largest of the last {n} {x}", "def top_{n}_{x}({x}):\n    return max({x}[-{n}:])"),
    ("keeps the {x} above {n}", "def {x}_above_{n}({x}):\n    return [x for x in {x} if x > {n}]"),
    ("multiplies all {x} by {n}", "def {x}_times_{n}({x}):\n    return [{n} * x for x in {x}]"),
    ("counts the {x} equal to {n}", "def count_{n}_{x}({x}):\n    return {x}.count({n})"),
]
SHELL_TASKS = [
    ("shows the first {n} lines of {x}", "head -n {n} {x}\n# prints the first {n} lines"),
    ("shows the last {n} lines of {x}", "tail -n {n} {x}\n# prints the last {n} lines"),
    ("finds the number {n} in {x}", "grep -n -w {n} {x}\n# prints the lines that hold {n}"),
    ("splits {x} into pieces of {n} lines", "split -l {n} {x}\n# writes pieces of {n} lines"),
]


def chat(rng: random.Random) -> Turns:
    """One polite dialogue of one or two rounds."""
    name, occasion = rng.choice(NAMES), rng.choice(OCCASIONS)
    wish, ideas = rng.choice(list(IDEAS.items()))
    first, second = rng.sample(ideas, 2)
    turns = [
        f"{rng.choice(GREETINGS)} I am {name}. Could you suggest {wish} for {occasion}?",
        f"Hello {name}, with pleasure. For {occasion} I would suggest {first}.",
    ]
    if rng.random() < 0.4:
        turns += [
            "Thank you very much. What else could it be?",
            f"You are most welcome, {name}. Another good choice is {second}.",
        ]
    return turns


def arithmetic(rng: random.Random) -> Turns:
    """One worked sum, difference or product of numbers below 100; half of the sums are asked in words."""
    name, items, kind = rng.choice(NAMES), rng.choice(ITEMS), rng.choice(["words", "plus", "minus", "times"])
    a, b = rng.randint(20, 99), rng.randint(2, 19)
    if kind == "words":
        question = f"What is {in_words(a)} plus {in_words(b)}?"
        work = f"In digits, {a} and {b}: {a} + {b} = {a + b}."
        return [question, f"{work} The answer is {a + b}."]
    if kind == "plus":
        question = f"{name} has {a} {items} and gets {b} more. How many now?"
        work, answer = f"{a} {items} and {b} more: {a} + {b} = {a + b}.", a + b
    elif kind == "minus":
        question = f"{name} has {a} {items} and gives {b} away. How many are left?"
        work, answer = f"{a} {items} without {b}: {a} - {b} = {a - b}.", a - b
    else:
        question = f"How many {items} are in {b} boxes of {a}?"
        work, answer = f"{b} boxes of {a} {items}: {b} * {a} = {a * b}.", a * b
    return [question, f"{work} The answer is {answer}."]


def code(rng: random.Random) -> Turns:
    """One small Python function or shell command for a described task."""
    n = rng.randint(2, 50)
    if rng.random() < 0.5:
        task, answer = rng.choice(PYTHON_TASKS)
        what, x = "Python function", rng.choice(LISTS)
    else:
        task, answer = rng.choice(SHELL_TASKS)
        what, x = "shell command", rng.choice(FILES)
    opening = rng.choice(["Write a", "Give a", "Show a"])
    return [f"{opening} {what} that {task.format(n=n, x=x)}.", answer.format(n=n, x=x)]


def in_words(number: int) -> str:
    """English words of an integer from 0 to 99."""
    if number < 20:
        return UNITS[number]
    tens, units = divmod(number, 10)
    return TENS[tens - 2] + (f"-{UNITS[units]}" if units else "")


GENERATORS: dict[str, Callable[[random.Random], Turns]] = {
    "chat": chat,
    "math": arithmetic,
    "math_again": arithmetic,
    "code": code,
}
