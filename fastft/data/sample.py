"""The embedded sample data set, `--data sample`: small enough to learn from scratch, and with fair held-out questions.

A table holds categories; a category holds facts (an operand and its one answer) and six wordings of one question. Every
fact is asked in every wording, so there are `facts * 6` questions and each has exactly one right answer:

    fact     plural, wolf -> wolves
    wording  "Give the plural of {}."            "{}" takes the operand; without "{}" the operand is the record's input
    record   {"instruction": "Give the plural of wolf.", "input": "", "output": "wolves", "category": "plural"}

Most facts give up one of their six questions to the test or the validation part and keep five in training. So a
held-out question is never seen in training, word for word, yet both of its halves are: the fact in five other wordings,
the wording with other facts. That is what makes it fair: a model that starts from random weights cannot know that the
plural of "wolf" is "wolves" and is not asked to guess it; it is asked to recall in some words what it was taught in
others. One that only memorised whole prompts fails. The score says nothing about knowledge of English.

Two choices keep that learnable for a model of a few million weights: all wordings of a category keep its key word
("plural"), and an operand has the same GPT-2 tokens in all of them (after a space, or alone in the input).

The order is fixed by arithmetic and SHA-256, without a random generator: it is the same on every Python. Training comes
first, then test, then validation, in the shares of the cut by position: `int(0.85 * n)`, `int(0.10 * n)`, the rest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Part = Literal["train", "test", "validation"]

# The fact at running number i gives its held-out question to PARTS[i % 10]. With six wordings to a fact that is
# 6 / 60 = 10% of the questions for test, 3 / 60 = 5% for validation; one fact in ten is held out nowhere.
PARTS: tuple[Part, ...] = (
    "test",
    "test",
    "validation",
    "test",
    "test",
    "validation",
    "test",
    "test",
    "validation",
    "train",
)


@dataclass(frozen=True)
class Fact:
    """One thing to know: in its category, `operand` has the one answer `answer`."""

    category: str
    operand: str
    answer: str


@dataclass(frozen=True)
class Question:
    """A fact asked in one wording, and the part of the data it belongs to."""

    fact: Fact
    wording: str
    part: Part

    @property
    def record(self) -> dict[str, str]:
        """The question as an entry of the data set."""
        inline = "{}" in self.wording
        return {
            "instruction": self.wording.format(self.fact.operand),
            "input": "" if inline else self.fact.operand,
            "output": self.fact.answer,
            "category": self.fact.category,
        }


@dataclass(frozen=True)
class Category:
    """A row of the table: answers by operand, and the wordings in which each is asked for."""

    name: str
    wordings: tuple[str, str, str, str, str, str]
    answers: Mapping[str, str]


def sample_records() -> list[dict[str, str]]:
    """The sample data set in file order: training, test, validation."""
    return [question.record for question in sample_questions()]


def sample_questions() -> list[Question]:
    """The questions behind `sample_records`, in the same order, with the fact and the wording that each came from."""
    questions: list[Question] = []
    number = 0  # of the fact, running through all categories
    for category in CATEGORIES:
        for row, (operand, answer) in enumerate(category.answers.items()):
            fact = Fact(category.name, operand, answer)
            held_out = row % len(category.wordings)  # every wording of a category is held out about equally often
            for column, wording in enumerate(category.wordings):
                part = PARTS[number % len(PARTS)] if column == held_out else "train"
                questions.append(Question(fact, wording, part))
            number += 1
    order: dict[Part, int] = {"train": 0, "test": 1, "validation": 2}
    return sorted(questions, key=lambda question: (order[question.part], _mixed(question)))


def _mixed(question: Question) -> bytes:
    """A sort key that scatters neighbours of the table."""
    return hashlib.sha256(f"{question.wording}\n{question.fact.operand}".encode()).digest()


def _pairs(text: str) -> dict[str, str]:
    """Reads a table of `operand answer` pairs, separated by commas; `_` stands for a space inside an answer."""
    rows = [pair.split() for pair in text.split(",")]
    return {operand: answer.replace("_", " ") for operand, answer in rows}


CATEGORIES = (
    Category(
        "plural",
        (
            "What is the plural of {}?",
            "Give the plural of {}.",
            "Which word is the plural of {}?",
            "Please write down the plural of {}.",
            "Turn the singular noun {} into its plural.",
            "How do you write the plural of {}?",
        ),
        _pairs(
            """
            wolf wolves, leaf leaves, knife knives, shelf shelves, loaf loaves, thief thieves, wife wives,
            child children, tooth teeth, foot feet, goose geese, mouse mice, man men, woman women, ox oxen,
            city cities, lady ladies, story stories, family families, berry berries, box boxes, church churches,
            brush brushes, glass glasses, dish dishes, potato potatoes, tomato tomatoes, crisis crises
            """
        ),
    ),
    Category(
        "past tense",
        (
            "What is the past tense of {}?",
            "Give the past tense of {}.",
            "Which word is the simple past tense of {}?",
            "Please write down the past tense of {}.",
            "Put the verb {} into the past tense.",
            "How do you form the past tense of {}?",
        ),
        _pairs(
            """
            go went, see saw, take took, give gave, write wrote, drive drove, eat ate, drink drank, begin began,
            swim swam, run ran, come came, know knew, grow grew, throw threw, draw drew, break broke, speak spoke,
            choose chose, freeze froze, bring brought, buy bought, think thought, teach taught, catch caught,
            keep kept, stand stood, build built
            """
        ),
    ),
    Category(
        "opposite",
        (
            "What is the opposite of {}?",
            "Give the opposite of {}.",
            "Which word means the opposite of {}?",
            "Please name the opposite of {}.",
            "Replace the word {} by its opposite.",
            "I am looking for the opposite of {}.",
        ),
        _pairs(
            """
            hot cold, big small, fast slow, early late, high low, rich poor, wet dry, full empty, young old,
            strong weak, heavy light, happy sad, clean dirty, long short, wide narrow, thick thin, deep shallow,
            loud quiet, true false, north south, east west, day night, up down, inside outside, push pull,
            always never, cheap expensive, first last
            """
        ),
    ),
    Category(
        "capital",
        (
            "What is the capital of {}?",
            "Name the capital of {}.",
            "Which city is the capital of {}?",
            "Please tell me the capital of {}.",
            "The country is {}. What is its capital?",
            "Do you know the capital of {}?",
        ),
        _pairs(
            """
            France Paris, Spain Madrid, Italy Rome, Germany Berlin, Austria Vienna, Portugal Lisbon, Greece Athens,
            Norway Oslo, Sweden Stockholm, Denmark Copenhagen, Finland Helsinki, Poland Warsaw, Hungary Budapest,
            Ireland Dublin, Belgium Brussels, Russia Moscow, Turkey Ankara, Egypt Cairo, Kenya Nairobi, Japan Tokyo,
            China Beijing, India New_Delhi, Thailand Bangkok, Vietnam Hanoi, Cuba Havana, Peru Lima, Canada Ottawa,
            Australia Canberra
            """
        ),
    ),
    Category(
        "kind",
        (
            "What kind of thing is this: a bird, a flower, a fruit, an instrument, a tool or a vegetable?",
            "Name the kind: bird, flower, fruit, instrument, tool or vegetable.",
            "Which kind fits the word best: bird, flower, fruit, instrument, tool or vegetable?",
            "Put the word into its kind: bird, flower, fruit, instrument, tool or vegetable.",
            "Of which kind is it, a bird, a flower, a fruit, an instrument, a tool or a vegetable?",
            "Choose the right kind from these: bird, flower, fruit, instrument, tool, vegetable.",
        ),
        _pairs(
            """
            eagle bird, rose flower, apple fruit, violin instrument, hammer tool, carrot vegetable,
            sparrow bird, tulip flower, banana fruit, flute instrument, wrench tool, cabbage vegetable,
            owl bird, daisy flower, mango fruit, trumpet instrument, chisel tool, spinach vegetable,
            parrot bird, orchid flower, plum fruit, piano instrument, screwdriver tool, onion vegetable,
            penguin bird, lily flower, pear fruit, guitar instrument, shovel tool, lettuce vegetable
            """
        ),
    ),
    Category(
        "number in words",
        (
            "Write the number {} in words.",
            "What is the number {} in words?",
            "Give the number {} in words.",
            "How do you write the number {} in words?",
            "Please spell out the number {} in words.",
            "In words, what is the number {}?",
        ),
        _pairs(
            """
            12 twelve, 13 thirteen, 14 fourteen, 15 fifteen, 16 sixteen, 17 seventeen, 18 eighteen, 19 nineteen,
            20 twenty, 30 thirty, 40 forty, 50 fifty, 60 sixty, 70 seventy, 80 eighty, 90 ninety
            """
        ),
    ),
    Category(
        "comparative",
        (
            "What is the comparative of this adjective?",
            "Give the comparative of the adjective.",
            "Which word is the comparative of the adjective below?",
            "Please write down the comparative of this adjective.",
            "Turn the adjective into its comparative.",
            "Form the comparative of the following adjective.",
        ),
        _pairs(
            """
            tall taller, warm warmer, dark darker, steep steeper, sweet sweeter, brave braver, wise wiser,
            large larger, busy busier, funny funnier, lucky luckier, noisy noisier, good better, bad worse
            """
        ),
    ),
    Category(
        "unit conversion",
        (
            "Convert {} kilometres to metres.",
            "How many metres are {} kilometres?",
            "Express {} kilometres in metres.",
            "Write {} kilometres as metres.",
            "A road is {} kilometres long. How long is it in metres?",
            "What do you get when you turn {} kilometres into metres?",
        ),
        {str(km): f"{km}000 metres" for km in (2, 3, 4, 5, 6, 7, 8, 9, 25, 35, 45, 75)},
    ),
    Category(
        "next month",
        (
            "Which month comes after {}?",
            "Name the month after {}.",
            "What is the month after {}?",
            "Please tell me the month after {}.",
            "It is {}. What is the month after this one?",
            "Do you know the month after {}?",
        ),
        _pairs(
            """
            January February, February March, March April, April May, May June, June July, July August,
            August September, September October, October November, November December, December January
            """
        ),
    ),
    Category(
        "young animal",
        (
            "What is the young of a {} called?",
            "Name the young of a {}.",
            "Which word is used for the young of a {}?",
            "Please tell me what the young of a {} is called.",
            "You see the young of a {}. What is it called?",
            "How do we call the young of a {}?",
        ),
        _pairs(
            """
            cow calf, sheep lamb, goat kid, horse foal, cat kitten, dog puppy, duck duckling, swan cygnet, pig piglet,
            lion cub
            """
        ),
    ),
    Category(
        "doubling",
        (
            "What is double {}?",
            "Give double {} as a word.",
            "Which number is double {}?",
            "Please work out double {}.",
            "Take {} and make it double.",
            "How much is double {}?",
        ),
        _pairs(
            """
            one two, two four, three six, four eight, five ten, six twelve, seven fourteen, eight sixteen,
            nine eighteen, ten twenty
            """
        ),
    ),
    Category(
        "capital letters",
        (
            "Write the word in capital letters.",
            "What is this word in capital letters?",
            "Change the following word to capital letters.",
            "Please give the word in capital letters.",
            "Use capital letters only for this word.",
            "How does the word look in capital letters?",
        ),
        {word: word.upper() for word in ("milk", "house", "table", "green", "music", "paper", "water", "garden")},
    ),
    Category(
        "sorting",
        (
            "Sort the numbers from smallest to largest.",
            "Put these numbers in order, from smallest to largest.",
            "Arrange the following numbers from smallest to largest.",
            "Please list the numbers from smallest to largest.",
            "Write these numbers again, from smallest to largest.",
            "What is the order of the numbers from smallest to largest?",
        ),
        {
            ", ".join(map(str, numbers)): ", ".join(map(str, sorted(numbers)))
            for numbers in (
                (9, 2, 7),
                (31, 18, 24),
                (66, 81, 52),
                (5, 3, 8),
                (47, 12, 39),
                (90, 73, 85),
                (28, 61, 10),
                (44, 99, 57),
            )
        },
    ),
    Category(
        "spelling",
        (
            "Spell the word with hyphens between the letters.",
            "Put hyphens between the letters of this word.",
            "Write the letters of the word with hyphens between them.",
            "Please spell the following word with hyphens.",
            "How do you spell this word with hyphens?",
            "Separate the letters of the word by hyphens.",
        ),
        {word: "-".join(word) for word in ("cup", "sun", "pen", "hat", "jam", "net", "log", "bed")},
    ),
)
