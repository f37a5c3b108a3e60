"""What several tests of the converter share."""

from __future__ import annotations

import sys

import pytest

from jaxdecode.cli import main


@pytest.fixture
def run(monkeypatch, capsys):
    """run("convert", …) -> exit code, standard output, standard error of the command line."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["jaxdecode", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run
