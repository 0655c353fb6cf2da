"""The embedded conversations, `--conversation sample`: 20 of two turns, short enough for a small model's context.

The second turn builds on the first one: it changes what was asked, asks for the next step, or asks about the answer.
Where there is a right answer a reference gives it; that of a second turn is what is right after a right first answer.
Writing has none.
"""

from __future__ import annotations

from typing import Any


def sample_rows() -> list[dict[str, Any]]:
    """The conversations as rows of a file that `--conversation` takes."""
    return [
        {"id": number, "category": category, "turns": [first, second], "reference": references}
        for number, (category, first, second, *references) in enumerate(_SAMPLE, start=1)
    ]


_SAMPLE: tuple[tuple[str, str, str, str | None, str | None], ...] = (
    ("knowledge", "What is the capital of Italy?",
     "And of France?", "Rome", "Paris"),
    ("knowledge", "Which planet is closest to the sun?",
     "Which one comes next after it?", "Mercury", "Venus"),
    ("knowledge", "Which gas do plants take out of the air to grow?",
     "And which one do they give back by day?", "carbon dioxide", "oxygen"),
    ("knowledge", "How many legs has a spider?",
     "Name an animal that has two legs fewer.", "eight", "an insect, such as an ant"),
    ("arithmetic", "What is 7 plus 6?",
     "Double that number.", "13", "26"),
    ("arithmetic", "A pencil costs 2 euros. What do 4 pencils cost?",
     "How much of 10 euros is left after that?", "8 euros", "2 euros"),
    ("arithmetic", "How many minutes are there in two hours?",
     "And in half of that time?", "120", "60"),
    ("language", "What is the opposite of cold?",
     "And of wet?", "hot", "dry"),
    ("language", "Give the past tense of go.",
     "Use that form in one short sentence.", "went", None),
    ("language", "What is the plural of child?",
     "And the singular of geese?", "children", "goose"),
    ("language", "Put into the passive voice: The dog chased the cat.",
     "Now put your sentence into the future tense.", "The cat was chased by the dog.",
     "The cat will be chased by the dog."),
    ("reasoning", "Anna is taller than Ben, and Ben is taller than Carl. Who is the tallest?",
     "And who is the shortest?", "Anna", "Carl"),
    ("reasoning", "Today is Friday. Which day is it in two days?",
     "And which day was it yesterday?", "Sunday", "Thursday"),
    ("reasoning", "A box holds only red balls. I take out one ball. What colour is it?",
     "I add ten blue balls and take one out unseen. Is its colour certain?", "red", "No, it may be red or blue."),
    ("reading", 'Read this: "Maria bought three apples and two pears on Monday." What did Maria buy?',
     "On which day?", "three apples and two pears", "Monday"),
    ("reading", 'Is this positive or negative? "The soup was cold and the waiter was rude."',
     "Change it so that it says the opposite.", "negative", "The soup was hot and the waiter was kind."),
    ("reading", "Which of these words are animals? plum, horse, cherry, goat",
     "And what are the others?", "horse and goat", "fruits"),
    ("writing", "Write one sentence about the sea in winter.",
     "Say the same in at most five words.", None, None),
    ("writing", "Suggest a name for a small bakery.",
     "Write a slogan of one line for it.", None, None),
    ("writing", "Give me one tip for sleeping better.",
     "Explain in one sentence why that helps.", None, None),
)  # fmt: skip
"""Category, first and second turn, their references."""
