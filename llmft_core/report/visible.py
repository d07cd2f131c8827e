"""Text made visible: white space and what a terminal or a browser would swallow or obey."""

from __future__ import annotations

import unicodedata

SPACE, TAB, NEWLINE = "·", "⇥", "⏎"
BEGIN_TRAINED, END_TRAINED = "⟦", "⟧"
BEGIN_SPECIAL, END_SPECIAL = "▐", "▌"
PART = "░"
MARKS = frozenset((SPACE, TAB, NEWLINE, PART, BEGIN_TRAINED, END_TRAINED, BEGIN_SPECIAL, END_SPECIAL))
"""What the terminal view writes itself: in a text they are written as their code points."""


def visible(text: str) -> str:
    """For a terminal: spaces, tabs and line ends as marks, everything that does not print as its code point. A line
    end keeps its line break, behind the mark.

    >>> visible("a b\\u200b")
    'a·b\\\\u{200b}'
    """
    marked = {" ": SPACE, "\t": TAB, "\n": f"{NEWLINE}\n"}
    return "".join(
        marked.get(character) or (code_point(character) if character in MARKS else printable(character))
        for character in attached(text)
    )


def printable(character: str) -> str:
    """The character, or its code point where it does not print: control and format characters, odd spaces."""
    return character if character.isprintable() else code_point(character)


def plain(text: str) -> str:
    """The text in one line, every character as one that prints: for names of files and the like."""
    return "".join(map(printable, text))


def attached(text: str) -> str:
    """The text with something for a combining first character to combine with: not what stands before it."""
    return f"\u25cc{text}" if text and unicodedata.category(text[0]).startswith("M") else text


def code_point(character: str) -> str:
    """`\\u{200b}`."""
    return f"\\u{{{ord(character):x}}}"
