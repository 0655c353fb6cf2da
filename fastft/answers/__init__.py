"""Answers: a trained run -> `responses.json`, `conversations.json`, or a talk in the terminal.

To be read in this order:

    options.py           how a model is asked, and what: `AnswerOptions`, `GenerateOptions`, `ChatOptions`
    generation.py        a split's prompts answered: `generate`; the model for it: `model_to_answer`
    asking.py            questions of one's own: `ask`, `answer`, `write_answers`
    benchmark.py         conversations to be had, read
    benchmark_sample.py  those that are embedded
    conversations.py     them had, turn by turn: `converse`
    responses.py         answers as they end, and what they were made from: a killed call goes on
    chat.py              one instruction a line: `chat`
"""
