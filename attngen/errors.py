"""Every error that attngen raises, and how its message is put together.

A message names the argument, what was expected, what came, and what to do about it.
"""

from __future__ import annotations


class AttngenError(Exception):
    """Base of all attngen errors."""


class SpecError(AttngenError, ValueError):
    """A spec that has no meaning: a syntax error, a wrong kind, an undeclared name.

    When the source text is known the message carries it with a caret under the offending part.
    """

    def __init__(self, problem: str, *, text: str | None = None, column: int = 0, width: int = 1, fix: str = ""):
        self.problem, self.text, self.column, self.fix = problem, text, column, fix
        lines = [problem]
        if text is not None:
            shown, column = _window(text, column)
            lines += ["    " + shown, "    " + " " * column + "^" * max(1, min(width, len(shown) - column))]
        if fix:
            lines.append(fix)
        super().__init__("\n".join(lines))


class InputError(AttngenError, ValueError):
    """A call whose arguments do not fit the spec: name, expected and given shape, dtype or device."""

    def __init__(self, name: str, expected: object, got: object, fix: str = ""):
        self.name, self.expected, self.got, self.fix = name, expected, got, fix
        super().__init__(f"{name}: expected {expected}, got {got}" + (f"; {fix}" if fix else ""))


class ScheduleError(AttngenError, ValueError):
    """A schedule that is not legal for the target: which limit, and by how much."""


class StoreError(AttngenError, RuntimeError):
    """The record database can't be read or written by an explicit request."""


class PackError(AttngenError, RuntimeError):
    """A pack of prebuilt kernels that is damaged, unsafe or of an unknown schema."""


class GroupError(AttngenError, RuntimeError):
    """A rank of a process group is lost, or did not answer within the group's time-out."""


class AttngenWarning(UserWarning):
    """Something works, but not the way it should: said once, with the reason."""


def _window(text: str, column: int, width: int = 96) -> tuple[str, int]:
    """Cut a long or multi-line text down to the part around `column`, which stays under the caret."""
    start = text.rfind("\n", 0, column) + 1
    end = text.find("\n", column)
    line, column = text[start : end if end >= 0 else len(text)], column - start
    if len(line) > width:
        left = max(0, min(column - width // 2, len(line) - width))
        line, column = line[left : left + width], column - left
    return line, min(column, len(line))
