"""The one error of conversion: every problem that was found, reported once."""

from __future__ import annotations

from collections.abc import Sequence

SHOWN = 30  # problems of a message
LONGEST = 600  # characters of a problem; names in a file may be as long as the file


class ConversionError(ValueError):
    """A checkpoint cannot be converted; `problems` lists every reason, one line each."""

    def __init__(self, problems: Sequence[str] | str, subject: str = "cannot convert"):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        lines = [plain_line(problem) for problem in self.problems[:SHOWN]]
        if len(self.problems) > SHOWN:
            lines.append(f"… and {len(self.problems) - SHOWN} more problems")
        subject = plain_line(subject)
        if len(lines) == 1:
            super().__init__(f"{subject}: {lines[0]}")
        else:
            super().__init__(f"{subject}: {len(self.problems)} problems\n" + "\n".join(f"  - {line}" for line in lines))


def plain_line(text: str) -> str:
    """What may be shown of a text that holds a stranger's words: one line of sane length, nothing a terminal obeys."""
    shown = "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text[:LONGEST]
    )
    return shown if len(text) <= LONGEST and len(shown) <= LONGEST else f"{shown[:LONGEST]} …"
