"""Groups of commands, whose help and errors no terminal breaks within a word, however narrow it is."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from io import StringIO
from typing import Any

import typer
from typer.core import TyperGroup

from attnreg.cli.shared import WIDE, say, wrapped

# These are click's in some versions of typer, and typer's own in others.
_Context: Any = TyperGroup.context_class
_Formatter: Any = _Context.formatter_class
_Shown: Any = next(each for each in typer.BadParameter.__mro__ if each.__name__ == "ClickException")

# Less is no terminal; more is not easily read.
LEAST, MOST = 20, 78
# Where names leave too little room beside them, texts stand below, indented so far.
BELOW = 4


class Help(_Formatter):  # type: ignore[misc]
    """Sets help as typer does, but at any width, and breaks lines between words alone."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # typer takes 50 columns at least, and a terminal that has fewer breaks the words.
        self.width: int = min(self.width, MOST, max(shutil.get_terminal_size().columns - 2, LEAST))

    def write_usage(self, prog: str, args: str = "", prefix: str | None = None) -> None:
        """Write how a command is called; what is required without the braces that some versions of typer put around it."""
        head = f"{prefix or 'Usage: '}{prog}"
        width = self.width - self.current_indent
        indent = len(head) + 1 if len(head) < width // 2 else BELOW
        given = re.sub(r"\{(\w+)\}", r"\1", args)
        self.write("\n".join(wrapped(f"{head} {given}", width, " " * indent)) + "\n")

    def write_text(self, text: str) -> None:
        """Write a text of one paragraph or more."""
        if "\b" in text:  # it asks for its lines to be left as they are
            super().write_text(text)
            return
        indent = " " * self.current_indent
        for number, paragraph in enumerate(re.split(r"\n\s*\n", text.strip())):
            lines = wrapped(" ".join(paragraph.split()), self.width, indent, indent)
            self.write("\n" * (number > 0) + "\n".join(lines) + "\n")

    def write_dl(self, rows: Sequence[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        """Write names, and what is to be said of each."""
        room = self.width - self.current_indent
        column = min(max(len(name) for name, _ in rows), col_max) + col_spacing
        if column + max(len(word) for _, text in rows for word in (text.split() or [""])) > room:
            column = BELOW
        indent = " " * self.current_indent
        for name, text in rows:
            lines = wrapped(text, room - column)
            beside = lines.pop(0) if len(name) <= column - col_spacing else ""
            self.write(f"{indent}{name:{column}}{beside}".rstrip() + "\n")
            for line in filter(None, lines):
                self.write(f"{indent}{'':{column}}{line}\n")


class Context(_Context):  # type: ignore[misc]
    """Of a command whose help is set by :class:`Help`."""

    formatter_class = Help


class Group(TyperGroup):
    """Commands by name. The classes that are ``Any`` here differ between versions of typer."""

    context_class = Context

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name; None where there is none."""
        found: Any = super().get_command(ctx, cmd_name)
        if found is not None:
            found.context_class = Context
        return found

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the commands, each with the first sentence of its help, however long: typer would cut it off."""
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [
            (name, each.get_short_help_str(WIDE)) for name, each in commands if each is not None and not each.hidden
        ]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)


@contextmanager
def usage_errors() -> Iterator[None]:
    """Errors in what was given are told as all else is: broken between words on a terminal, whole elsewhere."""
    try:
        yield
    except _Shown as error:
        error.show = partial(_show, error.show)
        raise


def _show(show: Callable[..., None], file: Any = None) -> None:
    text = StringIO()
    show(file=text)
    say(text.getvalue().rstrip("\n"), err=True)
