"""click commands that report every failure in one line, and the option types that the scripts share."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import click

from dnnlib.signals import ENDING, catching, exit_in_order
from dnnlib.util import UserError, one_line

__all__ = [
    "BOOL",
    "CLASS_LIST",
    "FLOAT_LIST",
    "INT_LIST",
    "AutoFloat",
    "Command",
    "FloatRange",
    "Group",
    "NameList",
    "add_options",
    "blame",
    "given_options",
    "output_file",
    "parse_int_list",
    "writable",
]

_MAX_INTS = 10_000_000
TECHNICAL_LIMIT = 1e12  # upper limits from here on only keep numbers representable; --help leaves them out


def parse_int_list(text: str) -> list[int]:
    """Return the integers of a list such as '1,2,5-10'. Raise ValueError for any other text, even an empty one."""
    result: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,18})(?:-([0-9]{1,18}))?\s*", part)
        if match is None:
            raise ValueError(f"{text!r} is not a list of integers such as 0-63 or 1,2,5-10")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"{part.strip()!r} runs downwards; write {last}-{first}")
        if len(result) + last - first >= _MAX_INTS:
            raise ValueError(f"{text!r} holds more than {_MAX_INTS} integers")
        result.extend(range(first, last + 1))
    return result


class _IntList(click.ParamType):
    name = "LIST"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        if not isinstance(value, str):
            return [int(v) for v in value]
        try:
            return parse_int_list(value)
        except ValueError as e:
            self.fail(str(e), param, ctx)


class _Bool(click.ParamType):
    name = "BOOL"
    _values = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bool:
        try:
            return value if isinstance(value, bool) else self._values[str(value).strip().lower()]
        except KeyError:
            self.fail(f"{value!r} is none of 0, 1, false, true, no, yes", param, ctx)


class FloatRange(click.FloatRange):
    """A click.FloatRange that refuses NaN, which passes every comparison, and, with `finite`, infinity."""

    def __init__(self, *args: Any, finite: bool = True, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._finite = finite

    def _describe_range(self) -> str:
        if self.max is not None and self.max >= TECHNICAL_LIMIT:  # of no interest to people
            return f"x{'>' if self.min_open else '>='}{self.min:g}"
        return "" if self.min is None and self.max is None else super()._describe_range()

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        if math.isnan(number) or (self._finite and math.isinf(number)):
            self.fail(f"{value!r} is not a finite number" if self._finite else f"{value!r} is not a number", param, ctx)
        return number


class AutoFloat(FloatRange):
    """A FloatRange that takes 'auto', too."""

    name = "FLOAT or auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        return value if value == "auto" else super().convert(value, param, ctx)


def output_file(_ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Refuse, as the callback of an option, a path that cannot be written. Creates nothing.

    The user then learns it before the work, not after.
    """
    if value is not None:
        if not value:
            raise click.BadParameter("is empty, expected a file name", param=param)
        if os.path.isdir(value):
            raise click.BadParameter(f"{value} is a folder, expected a file name", param=param)
        folder = os.path.dirname(os.path.abspath(value))
        if not writable(folder):
            raise click.BadParameter(f"{value}: cannot be written in {folder}", param=param)
    return value


def writable(folder: str) -> bool:
    """Return whether files can be written in a folder, or in the nearest one above it if it is not there yet."""
    folder = os.path.abspath(folder)
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    return os.path.isdir(folder) and os.access(folder, os.W_OK)


class _FloatList(click.ParamType):
    """A list such as '0.5,1,2': finite numbers above 0. Converts to a sorted list without duplicates."""

    name = "LIST"

    def convert(self, value, param, ctx):
        if isinstance(value, list):
            return value
        try:
            numbers = [float(x) for x in value.split(",")]
        except ValueError:
            self.fail(f"'{value}' is not a list of numbers such as 0.5,1,2", param, ctx)
        if not all(0 < x < float("inf") for x in numbers):
            self.fail(f"'{value}': every number must be above 0", param, ctx)
        return sorted(set(numbers))


class _ClassList(click.ParamType):
    """Names, numbers and ranges of numbers with commas between them. The caller knows the names and reads the text."""

    name = "LIST"

    def convert(self, value, param, ctx):
        if re.fullmatch(r"[\s,]*", value):
            self.fail("is empty, expected names or numbers of classes", param, ctx)
        return value


class NameList(click.ParamType):
    """Some of `names`, with commas between them, or 'all'. Converts to a list in the order of `names`."""

    name = "LIST"

    def __init__(self, names: Collection[str]):
        self.names = list(names)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        chosen = self.names if value == "all" else value.split(",") if isinstance(value, str) else value
        unknown = [name for name in chosen if name not in self.names]
        if unknown:
            self.fail(f"'{unknown[0]}' is not one of {', '.join(self.names)}, all", param, ctx)
        return [name for name in self.names if name in chosen]


CLASS_LIST = _ClassList()
INT_LIST = _IntList()
FLOAT_LIST = _FloatList()
BOOL = _Bool()


def add_options(table: Sequence[Callable]) -> Callable:
    """Return a decorator that adds click options, so that --help shows them in this order."""

    def decorate(function: Callable) -> Callable:
        for option in reversed(table):
            function = option(function)
        return function

    return decorate


@contextlib.contextmanager
def blame(option: str) -> Iterator[None]:
    """Put the option in front of the message of any UserError that is raised inside, as in '--cls: ...'.

    Library code names quantities and files. Only the script knows which option they came from. Outside of a command, as
    in Python and in notebooks, there are no options, and the message stays as it is.
    """
    try:
        yield
    except UserError as e:
        if click.get_current_context(silent=True) is not None:
            e.message = one_line(f"{option}: {e.message}")
        raise


def given_options(besides: Collection[str] = ()) -> list[str]:
    """Return the options that the user gave to the running command, such as '--name', but not those in `besides`.

    `besides` holds names of parameters: without dashes.
    """
    ctx = click.get_current_context()
    return [
        p.opts[0]
        for p in ctx.command.params
        if p.name not in besides
        and ctx.get_parameter_source(p.name)
        not in (None, click.core.ParameterSource.DEFAULT, click.core.ParameterSource.DEFAULT_MAP)
    ]


def _fail(message: str, exit_code: int, lone: bool = False) -> None:
    # Under torchrun all processes meet the same mistake, so only rank 0 reports it, unless it belongs to one process.
    if lone or os.environ.get("RANK", "0") == "0":
        click.echo(f"Error: {one_line(message)}", err=True)
    sys.exit(exit_code)


class _OneLineErrors:
    """What Command and Group share: the spelling of options, the help, and failures as one line on stderr."""

    _standalone = False

    def __init__(self, *args: Any, context_settings: dict[str, Any] | None = None, **kwargs: Any):
        settings = {
            "show_default": True,
            "max_content_width": 120,
            "token_normalize_func": lambda name: name.replace("_", "-"),
            **(context_settings or {}),
        }
        super().__init__(*args, context_settings=settings, **kwargs)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the epilog without wrapping: it holds command lines to copy."""
        if self.epilog:
            formatter.write_paragraph()
            for line in self.epilog.strip("\n").splitlines():
                formatter.write(f"{line}\n")

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
        except KeyboardInterrupt:
            raise click.Abort from None  # click itself would print an empty line first
        except EOFError as e:
            raise RuntimeError("unexpected end of file") from e  # click would take this bug for Ctrl-D
        # click returns this result or the status of ctx.exit(). main() exits with that value in standalone mode.
        return None if self._standalone else result

    def main(
        self,
        args: Any = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command. In standalone mode exit with 0, 1 (data), 2 (usage), or 130, 143, 129 (Ctrl-C and signals).

        At most one line goes to stderr.
        """
        outer, self._standalone = self._standalone, standalone_mode
        # A signal lets every `finally` run, which removes unfinished files. Not in a group of processes: one that waits
        # for others that have gone would never come to it.
        alone = "RANK" not in os.environ and threading.current_thread() is threading.main_thread()
        handled = catching(exit_in_order, *ENDING) if standalone_mode and alone else contextlib.nullcontext()
        try:
            with handled:
                result = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        except click.ClickException as e:
            if not standalone_mode:
                raise
            _fail(e.format_message(), e.exit_code, getattr(e, "lone", False))
        except click.Abort:
            if not standalone_mode:
                raise
            _fail("interrupted", 130)
        except (MemoryError, RuntimeError) as e:
            # PyTorch raises a RuntimeError when memory runs out. Any other RuntimeError is a bug: show its traceback.
            memory = isinstance(e, MemoryError) or any(text in str(e) for text in ("allocate memory", "out of memory"))
            if not (standalone_mode and memory):
                raise
            _fail(
                "not enough memory for this; smaller batches or images need less",
                1,
                lone=not getattr(e, "shared", False),
            )
        except OSError as e:
            if not standalone_mode:
                raise
            if e.errno == errno.EPIPE:  # whoever reads our stdout has closed it, as in `... | head`
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                sys.exit(1)
            reason = e.strerror or str(e) or type(e).__name__
            _fail(f"{os.fsdecode(e.filename)}: {reason}" if isinstance(e.filename, (str, bytes)) else reason, 1)
        finally:
            self._standalone = outer
        if not standalone_mode:
            return result
        sys.exit(result or 0)


class Command(_OneLineErrors, click.Command):
    """A click.Command that treats dashes and underscores in options alike and fails in one line.

    Lists of integers may also be separated by spaces, as in argparse: --ch_mult 1 2 2 2.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        lists = (CLASS_LIST, INT_LIST)
        plain = {name.replace("_", "-") for p in self.params if p.type in lists for name in p.opts}
        joined: list[str] = []
        values = None  # 0 after a list's option, 1 after its first value, None elsewhere
        for arg in args:
            if values and re.fullmatch("[0-9]+", arg):
                joined[-1] += f",{arg}"
                continue
            values = 0 if arg.replace("_", "-") in plain else 1 if values == 0 else None
            joined.append(arg)
        return super().parse_args(ctx, joined)


class Group(_OneLineErrors, click.Group):
    """A click.Group of such commands. Without a subcommand it fails and names the ones there are."""

    command_class = Command

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{"no_args_is_help": False, **kwargs})

    def _choices(self, ctx: click.Context) -> str:
        return f"there are: {', '.join(self.list_commands(ctx))}"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args and not self.invoke_without_command:
            raise click.UsageError(f"Missing command; {self._choices(ctx)}.", ctx)
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as e:
            raise click.UsageError(f"{e.message.rstrip('.')}; {self._choices(ctx)}.", ctx) from e
