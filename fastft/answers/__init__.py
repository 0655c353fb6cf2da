"""Answers: a trained run -> `responses.json`, or a talk in the terminal.

To be read in this order:

    generation.py  a split's prompts answered: `generate`, `GenerateOptions`
    asking.py      questions of one's own: `ask`, `answer`, `write_answers`
    responses.py   answers as they end, and what they were made from: a killed call goes on
    chat.py        one instruction a line: `chat`, `ChatOptions`
"""
