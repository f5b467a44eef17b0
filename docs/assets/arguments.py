"""Docstrings name an argument at the start of a line, `name: what it is`; in a page each becomes an item of a list."""

from __future__ import annotations

import re

import griffe

_ITEM = re.compile(r"^((?:\w+=?, )*\w+=?): (?=\S)")
_NEW = re.compile(r"^(Raises|Returns|Nothing|None)\b")


class Arguments(griffe.Extension):
    """Rewrites the docstrings of functions and classes as they are read."""

    def on_function(self, *, func: griffe.Function, **_: object) -> None:
        """Of a function."""
        _rewrite(func.docstring)

    def on_class(self, *, cls: griffe.Class, **_: object) -> None:
        """Of a class."""
        _rewrite(cls.docstring)


def _rewrite(docstring: griffe.Docstring | None) -> None:
    if docstring is not None:
        docstring.value = listed(docstring.value)


def listed(text: str) -> str:
    """`name: ...` lines as items. What follows belongs to the item until its sentence has ended and a line starts anew."""
    lines: list[str] = []
    inside = False
    for line in text.split("\n"):
        item = _ITEM.match(line)
        if item:
            lines += [] if inside else [""]
            lines.append(f"- **{item[1]}**: {line[item.end() :]}")
        elif inside and line and not line.startswith(" ") and (_NEW.match(line) or lines[-1].endswith(".")):
            lines += ["", line]
        elif inside and line:
            lines.append("    " + line.strip())
        else:
            lines.append(line)
        inside = bool(item) or (inside and bool(line) and lines[-1].startswith("    "))
    return "\n".join(lines)
