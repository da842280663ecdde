"""The command group."""

import os

import click

from specguard import __version__
from specguard.cli.backends import backends
from specguard.cli.bench import bench
from specguard.cli.bench_speed import speed
from specguard.cli.calibrate import calibrate
from specguard.cli.chat import chat
from specguard.cli.completion import completion
from specguard.cli.groups import Commands, example
from specguard.cli.models import models
from specguard.cli.profiles import profiles
from specguard.cli.serve import serve
from specguard.cli.solve import solve
from specguard.cli.trace import trace

_PROBLEM = "Mia has 24 shells. Mia finds 9 more shells. How many shells does Mia have?"


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
    epilog=example(f'solve "{_PROBLEM}"'),
)
@click.version_option(__version__, prog_name="specguard")
def main() -> None:
    """Step-level speculative decoding that shows why it trusted each step."""
    # Warnings of transformers are for developers; whoever wants them sets this.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


for command, arguments in {
    solve: f'solve "{_PROBLEM}"',
    chat: "chat --models qwen3",
    serve: "serve --port 8000",
    models: "models use qwen3",
    backends: "backends",
    trace: "trace solution.json",
    bench: "bench --methods target,specguard --limit 20 --output results",
    calibrate: "calibrate mine --data problems.jsonl --fields problem=question,answer=answer",
    profiles: "profiles show mine",
}.items():
    command.epilog = "\n\n".join(filter(None, (command.epilog, example(arguments))))
    main.add_command(command)
main.add_command(completion)
bench.add_command(speed)
speed.epilog = example("bench speed --count 5")
