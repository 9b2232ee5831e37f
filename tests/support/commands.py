"""Commands of a script, called in this process: they must succeed, or fail in one line."""

from __future__ import annotations

from collections.abc import Callable

import click
from click.testing import CliRunner, Result


def callers(main: click.Command) -> tuple[Callable[..., str], Callable[..., None]]:
    """Return two functions of a command's arguments.

    `succeed(*args)` returns what the command prints. `fail(exit_code, *args, words)` demands one line on stderr that
    holds all `words`, which are separated by '|'.
    """

    def invoke(args: tuple) -> Result:
        return CliRunner().invoke(main, [str(a) for a in args])

    def succeed(*args):
        result = invoke(args)
        assert result.exit_code == 0, result.output + repr(result.exception)
        return result.stdout

    def fail(exit_code, *args_and_words):
        *args, words = args_and_words
        result = invoke(args)
        lines = result.stderr.strip().splitlines()
        assert result.exit_code == exit_code and len(lines) == 1 and lines[0].startswith("Error: "), result.output
        assert all(word in lines[0] for word in words.split("|")), lines

    return succeed, fail
