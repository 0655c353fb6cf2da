"""The phases, in the order in which they are worth knowing.

A phase is a module with `tasks()`, the names of what it does, and `do(task)`, which does one and returns what it found
as JSON can say it. Names are words: the first says what, the others of what.
"""
