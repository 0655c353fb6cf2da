"""A plugin of pytest that points the book's own tests at `fastft.integrations.book`, and answers their downloads.

`BOOK_DOWNLOADS` is a folder that holds the files by the last part of their address.
"""

from __future__ import annotations

import importlib
import os
import urllib.request
from pathlib import Path
from typing import Any

import tiktoken

from fastft.data.tokenizer import gpt2_tokenizer
from fastft.integrations import book

POINTED = []
"""The names of the book's modules that are now fastft's."""


def answered(url: str) -> Any:
    return (Path(os.environ["BOOK_DOWNLOADS"]) / url.rsplit("/", 1)[-1]).open("rb")


urllib.request.urlopen = answered
tiktoken.get_encoding = lambda _: gpt2_tokenizer().encoding

if "BOOK_AS_IT_IS" not in os.environ:
    for chapter in ("ch04", "ch05", "ch07"):
        module = importlib.import_module(f"llms_from_scratch.{chapter}")
        for name in book.__all__:
            if hasattr(module, name):
                setattr(module, name, getattr(book, name))
                POINTED.append(f"{chapter}.{name}")


def pytest_report_header() -> str:
    return f"pointed at fastft: {' '.join(POINTED)}"
