"""The command group, and the one place where errors become exit codes."""

import os
import sys
from typing import Any

import click

from specguard import SpecguardError, UsageError, __version__
from specguard.cli.backends import backends
from specguard.cli.bench import bench
from specguard.cli.bench_speed import speed
from specguard.cli.calibrate import calibrate
from specguard.cli.models import models
from specguard.cli.solve import solve
from specguard.cli.trace import trace

EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


class Commands(click.Group):
    """A group that ends with one line and a hint where an error is expected.

    Exit 2 for wrong usage, 1 for what is wrong outside, 130 after Ctrl-C. Any other exception is a
    defect and keeps its traceback.
    """

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except SpecguardError as error:
            click.echo(f"Error: {error.message}", err=True)
            if error.hint:
                click.echo(f"Hint: {error.hint}", err=True)
            ctx.exit(EXIT_USAGE if isinstance(error, UsageError) else EXIT_ERROR)
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            ctx.exit(EXIT_INTERRUPTED)
        except BrokenPipeError:
            # The reader has gone; nothing is left to say, not even while Python shuts down.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(EXIT_ERROR)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="specguard")
def main() -> None:
    """Step-level speculative decoding that shows why it trusted each step."""


main.add_command(solve)
main.add_command(models)
main.add_command(backends)
main.add_command(trace)
main.add_command(bench)
bench.add_command(speed)
main.add_command(calibrate)
