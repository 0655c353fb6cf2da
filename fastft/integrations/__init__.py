"""Integrations: other projects' names and signatures -> fastft's fast path behind them.

To be read in this order:

    book/  the code of "Build a Large Language Model (From Scratch)", chapters 4 to 7: `fastft.integrations.book`
"""
