"""What the command prints, where nobody looks at a terminal."""

from __future__ import annotations

import io
from contextlib import redirect_stdout

import pytest
from rich.table import Table

from flows import show


def test_tables_are_whole_where_no_terminal_cuts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    table = Table("first", "second")
    table.add_row("a" * 150, "b" * 150)
    out = io.StringIO()
    with redirect_stdout(out):
        show.terminal().print(table)
    assert any("a" * 150 in line and "b" * 150 in line for line in out.getvalue().splitlines())
    assert max(map(len, out.getvalue().splitlines())) < 320, "no wider than its content"
