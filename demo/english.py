"""English for `make demo-llm`, so that the language model keeps its own while it learns digits.

It answers everyday questions itself before it learns anything: its own answers teach no foreign style. And it
reads Python's own documentation, which every Python holds (PSF licence): docstrings of the standard library,
and articles of the language reference (`pydoc_data.topics`). HELD_OUT_TEXTS of these articles are kept for
the loss on English and are never trained on.
"""

from __future__ import annotations

import importlib
import inspect
import random
import re

CAPITAL = "What is the capital of France?"
"""Asked before and after; not among the questions."""

HELD_OUT_TEXTS = 24
LENGTH = 1200  # characters of each held-out text, about 300 tokens
TRAINED_LENGTH = 500  # characters of the others

LEAST = 300  # characters of a docstring; shorter ones are lists of arguments
MODULES = (
    *("argparse", "ast", "bisect", "calendar", "collections", "contextlib", "copy", "csv", "dataclasses"),
    *("datetime", "decimal", "difflib", "email.message", "enum", "fractions", "functools", "glob", "gzip"),
    *("heapq", "html.parser", "http.client", "inspect", "io", "ipaddress", "itertools", "json", "locale"),
    *("logging", "mailbox", "math", "mimetypes", "optparse", "os", "pathlib", "pickle", "pprint", "queue"),
    *("random", "re", "sched", "selectors", "shelve", "shutil", "smtplib", "socket", "sqlite3", "statistics"),
    *("string", "subprocess", "tarfile", "tempfile", "textwrap", "threading", "time", "timeit", "trace"),
    *("typing", "unittest", "urllib.parse", "urllib.request", "uuid", "warnings", "weakref", "zipfile"),
)

_THINGS = """a bicycle|bread|a rainbow|a library|the moon|rain|a garden|a clock
a bridge|coffee|a river|the sun|a volcano|a novel|winter|music"""
_QUESTIONS = (
    "What is {}?",
    "Tell me something interesting about {}.",
    "Write a short sentence with the words: {}.",
    "Explain {} to a child.",
    "Why do people care about {}?",
)
_OTHERS = (
    "How do I boil an egg?",
    "What is the capital of Japan?",
    "What is the capital of Italy?",
    "Who wrote Romeo and Juliet?",
    "What is two plus two?",
    "Count from one to ten.",
    "Name the seasons of the year.",
    "What colour is the sky?",
    "Write a poem of four lines about the sea.",
    "How many days has a week?",
    "Translate 'good morning' into French.",
    "What should I cook for dinner?",
    "Give me three tips for sleeping better.",
    "How does a plane fly?",
    "Write a polite letter that asks for a day off.",
    "Tell me a joke.",
    "What is the largest ocean?",
    "How can I learn to draw?",
    "What do you need to plant a tree?",
    "Who are you?",
)


def questions() -> list[str]:
    """Return the questions, 100 in all."""
    return [
        *_OTHERS,
        *(pattern.format(thing) for thing in re.split(r"[|\n]", _THINGS) for pattern in _QUESTIONS),
    ]


def held_out_texts() -> list[str]:
    """Return the begin of HELD_OUT_TEXTS long articles of Python's own reference."""
    return _articles()[:HELD_OUT_TEXTS]


def training_texts() -> list[str]:
    """Return the begin of all other long articles, and long docstrings of the standard library."""
    return [text[:TRAINED_LENGTH] for text in (*_articles()[HELD_OUT_TEXTS:], *_docstrings())]


def _docstrings() -> list[str]:
    """Return the docstrings of MODULES, their functions, classes and methods that have LEAST characters."""
    objects: list[object] = []
    for module in map(importlib.import_module, MODULES):
        members = [member for _, member in inspect.getmembers(module)]
        classes = [member for member in members if inspect.isclass(member)]
        methods = [method for each in classes for _, method in inspect.getmembers(each, inspect.isroutine)]
        objects += [module, *members, *methods]
    texts = {inspect.cleandoc(doc)[:LENGTH] for each in objects if isinstance(doc := each.__doc__, str)}
    return sorted(text for text in texts if len(text) >= LEAST)


def _articles() -> list[str]:
    """Return the first LENGTH characters of each long article, in an order by chance, each text once."""
    from pydoc_data.topics import topics

    texts = {re.sub(r"\n{3,}", "\n\n", text).strip()[:LENGTH] for text in topics.values()}
    whole = sorted(text for text in texts if len(text) == LENGTH)
    return random.Random(0).sample(whole, len(whole))
