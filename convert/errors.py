"""The one error of conversion: every problem that was found, reported once."""

from __future__ import annotations

from collections.abc import Sequence

SHOWN = 30


class ConversionError(ValueError):
    """A checkpoint cannot be converted; `problems` lists every reason, one line each."""

    def __init__(self, problems: Sequence[str] | str, subject: str = "cannot convert"):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        lines = self.problems[:SHOWN]
        if len(self.problems) > SHOWN:
            lines.append(f"… and {len(self.problems) - SHOWN} more problems")
        if len(lines) == 1:
            super().__init__(f"{subject}: {lines[0]}")
        else:
            super().__init__(f"{subject}: {len(self.problems)} problems\n" + "\n".join(f"  - {line}" for line in lines))
