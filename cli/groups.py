"""Groups of commands: help without cuts, and the one place where errors become exit codes."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
from click.exceptions import Exit

from specguard.core.errors import SpecguardError, UsageError

EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
_HINTS = {
    errno.ENOSPC: "free some space, or write somewhere else",
    errno.EACCES: "look at its permissions",
    errno.EPERM: "look at its permissions",
    errno.EROFS: "write somewhere else",
    errno.ENAMETOOLONG: "give it a shorter name",
    errno.EMFILE: "allow more open files: ulimit -n",
}
_OTHERWISE = "look whether it is there, and whose it is"


def example(arguments: str) -> str:
    """The last part of a command's help."""
    return f"\b\nExample:\n  specguard {arguments}"


class Group(click.Group):
    """A group that says what its commands do, however narrow the window."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List them; click would cut the summaries off."""
        rows = [
            (name, command.get_short_help_str(limit=1000))
            for name in self.list_commands(ctx)
            if (command := self.get_command(ctx, name)) is not None and not command.hidden
        ]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)


class Commands(Group):
    """A group that ends with one line and a hint where an error is expected.

    Exit 2 for wrong usage, 1 for what is wrong outside, 130 after Ctrl-C. Any other exception is a
    defect and keeps its traceback.
    """

    def make_context(self, *arguments: Any, **more: Any) -> click.Context:
        """Read the arguments; help and version are printed here."""
        with _exit_codes():
            return super().make_context(*arguments, **more)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        with _exit_codes():
            return super().invoke(ctx)


@contextmanager
def _exit_codes() -> Iterator[None]:
    try:
        yield
    except SpecguardError as error:
        _complain(error.message, error.hint)
        raise Exit(EXIT_USAGE if isinstance(error, UsageError) else EXIT_ERROR) from error
    except click.NoSuchOption as error:
        raise _no_option(error) from error
    except KeyboardInterrupt as error:
        click.echo("Interrupted.", err=True)
        raise Exit(EXIT_INTERRUPTED) from error
    except BrokenPipeError as error:  # the reader has gone; nothing is left to say
        _drop_output()
        raise Exit(EXIT_ERROR) from error
    except OSError as error:
        _drop_output()
        what = f"{error.filename}: " if error.filename is not None else ""
        _complain(f"{what}{error.strerror or error}", _HINTS.get(error.errno or 0, _OTHERWISE))
        raise Exit(EXIT_ERROR) from error
    except MemoryError as error:
        _complain("there is not enough memory", "ask for less at a time, or for smaller models")
        raise Exit(EXIT_ERROR) from error
    except RecursionError as error:
        _complain("the input is nested too deeply", "look at what wrote it")
        raise Exit(EXIT_ERROR) from error


def _complain(message: str, hint: str) -> None:
    for label, text in ("Error", message), ("Hint", hint):
        if text:
            line = " ".join(text.split())  # libraries' messages have several
            click.echo(f"{label}: {line.encode(errors='backslashreplace').decode()}", err=True)


def _no_option(error: click.NoSuchOption) -> click.UsageError:
    """A problem such as "-5 + 3" is taken for an option."""
    is_problem = error.ctx is not None and error.ctx.command.name == "solve"
    if not is_problem or error.option_name.startswith("--"):
        return error
    return click.UsageError(
        f"{error.format_message()}\nHint: a problem that begins with - stands behind --, as in "
        'specguard solve -- "-5 + 3"',
        error.ctx,
    )


def _drop_output() -> None:
    """Forget what cannot be written any more, so that Python does not try again as it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
