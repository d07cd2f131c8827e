"""Word problems made up on the spot, in GSM8K's schema: to try the whole pipeline without downloading anything."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, ClassVar, NamedTuple, TypeVar

from pydantic import Field

from llmft_core import DatasetFormat, Options, Split, hookimpl
from llmft_plugins.datasets.question_answer import QuestionAnswer

llmft_api = 1

T = TypeVar("T")

# name, subject, possessive
WOMEN = "Anna Maria Lucy Emma Sarah Julia Nina Grace Olivia Betty Clara Ruth"
MEN = "Tom James Peter David Mark Leo Adam Carlos Ben Henry Omar Jack"
PEOPLE = [(name, "she", "her") for name in WOMEN.split()] + [(name, "he", "his") for name in MEN.split()]
THINGS = [
    "apples",
    "books",
    "pencils",
    "stickers",
    "marbles",
    "cookies",
    "cards",
    "flowers",
    "shells",
    "stamps",
    "oranges",
    "muffins",
]
CONTAINERS = ["boxes", "bags", "baskets", "shelves", "jars"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
JOBS = ["washing cars", "babysitting", "walking dogs", "mowing lawns", "painting fences", "cleaning windows"]
RATIOS = [(2, "twice"), (3, "three times"), (4, "four times")]


class ArithmeticOptions(Options):
    """How many problems are made, and which."""

    seed: int = Field(0, ge=0, description="seed of the problems: another seed, other problems")
    rows: int = Field(1500, gt=0, description="training rows to make")
    test_rows: int = Field(150, gt=0, description="test rows to make; no question is in both splits")


class Dice:
    """Random choices from `random.random()` alone, the one stream that Python promises to keep between versions."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def between(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return low + int(self._random.random() * (high - low + 1))

    def pick(self, choices: Sequence[T]) -> T:
        """One of them, all equally likely."""
        return choices[self.between(0, len(choices) - 1)]

    def two(self, choices: Sequence[T]) -> tuple[T, T]:
        """Two different ones."""
        first = self.between(0, len(choices) - 1)
        second = (first + self.between(1, len(choices) - 1)) % len(choices)
        return choices[first], choices[second]


class Problem(NamedTuple):
    """A question, the sentences of its solution (a line each) and the result."""

    question: str
    steps: list[str]
    result: int


class Step(NamedTuple):
    """A calculation: its value and how it is written, `48/2 = <<48/2=24>>24`."""

    value: int
    text: str


def calculate(operator: str, *numbers: int, unit: str = "") -> Step:
    """`calculate("/", 48, 2)` → 24 and its text. ValueError where a template would divide with a remainder."""
    value = numbers[0]
    for number in numbers[1:]:
        if operator == "/" and value % number:
            raise ValueError(f"{value}/{number} is not a whole number")
        value = {"+": value + number, "-": value - number, "*": value * number, "/": value // number}[operator]
    expression = operator.join(map(str, numbers))
    spaced = f" {operator} ".join(f"{unit}{number}" for number in numbers) if operator in "+-" else expression
    return Step(value, f"{spaced} = {unit}<<{expression}={value}>>{value}")


def money_for_things(dice: Dice) -> Problem:
    name, she, _ = dice.pick(PEOPLE)
    thing = dice.pick(THINGS)
    count, price = dice.between(3, 15), dice.between(2, 12)
    cost = calculate("*", count, price, unit="$")
    question = f"{name} buys {count} {thing} at the market. Each of the {thing} costs ${price}. "
    if dice.between(0, 1):
        return Problem(
            question + f"How much money does {name} pay in total?",
            [f"{name} pays {cost.text} for the {thing}."],
            cost.value,
        )
    paid = cost.value + dice.between(1, 60)
    change = calculate("-", paid, cost.value, unit="$")
    return Problem(
        question + f"{she.capitalize()} had ${paid} in the morning. How much money does {name} have left?",
        [f"The {thing} cost {cost.text}.", f"So {name} has {change.text} left."],
        change.value,
    )


def half_as_many(dice: Dice) -> Problem:
    name, she, her = dice.pick(PEOPLE)
    thing, (first, second) = dice.pick(THINGS), dice.two(DAYS)
    count = 2 * dice.between(4, 60)
    half = calculate("/", count, 2)
    total = calculate("+", count, half.value)
    return Problem(
        f"{name} sold {count} {thing} to {her} friends on {first}, and then {she} sold half as many {thing} on "
        f"{second}. How many {thing} did {name} sell altogether on {first} and {second}?",
        [
            f"{name} sold {half.text} {thing} on {second}.",
            f"{name} sold {total.text} {thing} altogether on {first} and {second}.",
        ],
        total.value,
    )


def times_as_many(dice: Dice) -> Problem:
    (name, _, _), (friend, _, _) = dice.two(PEOPLE)
    thing, (factor, word) = dice.pick(THINGS), dice.pick(RATIOS)
    count, given = dice.between(5, 40), dice.between(2, 20)
    more = calculate("*", count, factor)
    both = calculate("+", count, more.value)
    question = f"{name} has {count} {thing}. {friend} has {word} as many {thing} as {name}. "
    steps = [f"{friend} has {more.text} {thing}.", f"Together they have {both.text} {thing}."]
    if dice.between(0, 1):
        return Problem(question + f"How many {thing} do they have together?", steps, both.value)
    found = calculate("+", both.value, given)
    return Problem(
        question + f"Then they find {given} more {thing} on the way to school. How many {thing} do they have now?",
        [*steps, f"With those they found, they have {found.text} {thing} now."],
        found.value,
    )


def wages(dice: Dice) -> Problem:
    name, she, _ = dice.pick(PEOPLE)
    job, hourly, hours, days = dice.pick(JOBS), dice.between(8, 25), dice.between(2, 8), dice.between(2, 6)
    daily = calculate("*", hourly, hours, unit="$")
    week = calculate("*", daily.value, days, unit="$")
    saved = dice.between(10, 90)
    total = calculate("+", week.value, saved, unit="$")
    question = (
        f"{name} earns ${hourly} an hour for {job}. {she.capitalize()} works {hours} hours a day, {days} days a week. "
    )
    steps = [f"{name} earns {daily.text} a day.", f"In a week {she} earns {week.text}."]
    if dice.between(0, 1):
        return Problem(question + f"How many dollars does {name} earn in a week?", steps, week.value)
    return Problem(
        question + f"{name} had already saved ${saved}. How much money does {she} have after one week?",
        [*steps, f"Together with the savings {she} has {total.text}."],
        total.value,
    )


def sharing(dice: Dice) -> Problem:
    name, she, her = dice.pick(PEOPLE)
    thing, container = dice.pick(THINGS), dice.pick(CONTAINERS)
    friends, each, boxes = dice.between(2, 9), dice.between(2, 9), dice.between(2, 9)
    total = friends * each * boxes
    per_box = calculate("*", friends, each).value
    all_things = calculate("*", boxes, per_box)
    share = calculate("/", total, friends)
    return Problem(
        f"There are {boxes} {container} with {per_box} {thing} in each. {name} shares all the {thing} equally "
        f"between {her} {friends} friends and keeps none. How many {thing} does each friend get?",
        [
            f"In all the {container} there are {all_things.text} {thing}.",
            f"So {she} gives each friend {share.text} {thing}.",
        ],
        share.value,
    )


def reading(dice: Dice) -> Problem:
    name, she, _ = dice.pick(PEOPLE)
    first, (factor, word), (yesterday, today) = dice.between(8, 30), dice.pick(RATIOS), dice.two(DAYS)
    rest = 2 * dice.between(10, 60)
    pages = first + first * factor + rest
    second = calculate("*", first, factor)
    read = calculate("+", first, second.value)
    left = calculate("-", pages, read.value)
    half = calculate("/", left.value, 2)
    return Problem(
        f"{name} is reading a book of {pages} pages. On {yesterday} {she} read {first} pages, and on {today} {she} "
        f"read {word} as many. {name} wants to read half of the remaining pages tomorrow. How many pages is that?",
        [
            f"{name} read {second.text} pages on {today}.",
            f"So {she} has read {read.text} pages since {yesterday}.",
            f"There are {left.text} pages left to be read.",
            f"Half of them is {half.text} pages.",
        ],
        half.value,
    )


def journey(dice: Dice) -> Problem:
    name, she, _ = dice.pick(PEOPLE)
    speed, hours = 10 * dice.between(3, 8), dice.between(2, 6)
    second_speed, second_hours = 10 * dice.between(3, 8), dice.between(2, 5)
    first, second = calculate("*", speed, hours), calculate("*", second_speed, second_hours)
    total = calculate("+", first.value, second.value)
    return Problem(
        f"{name} drives for {hours} hours at {speed} miles per hour. After a short rest, {she} drives for "
        f"{second_hours} more hours at {second_speed} miles per hour. How many miles does {name} drive in total?",
        [
            f"Before the rest, {name} drives {first.text} miles.",
            f"After it, {she} drives {second.text} miles.",
            f"The whole way is {total.text} miles.",
        ],
        total.value,
    )


def garden(dice: Dice) -> Problem:
    name, she, her = dice.pick(PEOPLE)
    red, percent, eaten = 20 * dice.between(2, 12), dice.pick([10, 20, 25, 50, 75]), dice.between(3, 15)
    yellow = red * percent // 100  # whole: a multiple of 20 times one of 5
    total = calculate("+", red, yellow)
    left = calculate("-", total.value, eaten)
    return Problem(
        f"In {her} garden, {name} grows {red} red tomatoes. The number of yellow tomatoes is {percent}% of the number "
        f"of red ones. The birds eat {eaten} of all these tomatoes. How many tomatoes can {she} pick?",
        [
            f"{name} grows {red}*{percent}/100 = <<{red}*{percent}/100={yellow}>>{yellow} yellow tomatoes.",
            f"In total there are {total.text} tomatoes in the garden.",
            f"After the birds have eaten, {left.text} tomatoes are left.",
        ],
        left.value,
    )


def ages(dice: Dice) -> Problem:
    (name, _, _), (friend, _, _) = dice.two(PEOPLE)
    age, older, years = dice.between(4, 30), dice.between(2, 20), dice.between(2, 15)
    now = calculate("+", age, older)
    later = calculate("+", now.value, years)
    return Problem(
        f"{name} is {age} years old. {friend} is {older} years older than {name}. "
        f"How old will {friend} be in {years} years?",
        [f"{friend} is {now.text} years old now.", f"In {years} years {friend} will be {later.text} years old."],
        later.value,
    )


TEMPLATES: list[Callable[[Dice], Problem]] = [
    money_for_things, half_as_many, times_as_many, wages, sharing, reading, journey, garden, ages,
]  # fmt: skip


def problems(seed: int) -> Iterator[dict[str, Any]]:
    """Rows without end, no question twice."""
    dice = Dice(seed)
    seen: set[str] = set()
    while True:
        question, steps, result = dice.pick(TEMPLATES)(dice)
        if question not in seen:
            seen.add(question)
            yield {"question": question, "answer": "\n".join([*steps, f"#### {result}"])}


class Arithmetic(QuestionAnswer):
    """Needs no source: the rows follow from the options alone."""

    name: ClassVar[str] = "arithmetic"
    summary: ClassVar[str] = "made-up word problems with worked answers, to try llmft without downloading anything"
    options_type: ClassVar[type[Options]] = ArithmeticOptions

    def generate(self, split: Split) -> Iterator[dict[str, Any]]:
        # One stream, the test rows first: the splits share no question, and more training rows leave the test as it is.
        stream = problems(self.options.seed)
        start, rows = (0, self.options.test_rows) if split == "test" else (self.options.test_rows, self.options.rows)
        return islice(stream, start, start + rows)


@hookimpl
def llmft_dataset_formats() -> list[type[DatasetFormat]]:
    return [Arithmetic]
