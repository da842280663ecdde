"""``specguard serve``: an OpenAI-compatible server."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from specguard import UsageError
from specguard.cli.method_options import method_options, settings_from
from specguard.cli.model_options import ModelOptions, model_options
from specguard.cli.output import Reporter
from specguard.cli.values import COUNT, Number, Whole
from specguard.models.pairs import BUILT_IN_PAIR
from specguard.serve.limits import Limits

_LIMITS = Limits()


@click.command()
@click.option("--host", default="127.0.0.1", help="Address to listen at.")
@click.option("--port", type=Whole(0, 65535), default=8000, help="Port; 0: any that is free.")
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    help="File of API keys, a line each, of which a request needs one. Without it only this "
    "machine is served.",
)
@click.option(
    "--cors-origin",
    "origins",
    multiple=True,
    metavar="ORIGIN",
    help="A site whose pages may use the server, like https://chat.example.com.",
)
@click.option(
    "--served-name",
    metavar="NAME",
    show_default="the pair's, else the target's",
    help="What clients call the model.",
)
@click.option("--batch-size", type=COUNT, default=_LIMITS.running, help="Solutions at a time.")
@click.option("--queue", type=Whole(0, 2**31 - 1), default=_LIMITS.waiting, help="That may wait.")
@click.option(
    "--memory-budget",
    type=COUNT,
    metavar="MIB",
    help="Most memory for keys and values; solutions wait until there is room.",
)
@click.option(
    "--time-limit",
    type=Number(0, min_open=True),
    default=_LIMITS.seconds,
    metavar="SECONDS",
    help="Most time of a request, in the queue included.",
)
@click.option(
    "--drain",
    type=Number(0),
    default=_LIMITS.drain_seconds,
    metavar="SECONDS",
    help="How long requests under way may take once the server is told to stop.",
)
@click.option("--log-prompts", is_flag=True, help="Say in the log what was asked.")
@click.option("--quiet", is_flag=True, help="Log only what goes wrong.")
@click.option(
    "--force", is_flag=True, help="Take problems that the built-in pair was not made for, too."
)
@model_options
@method_options
def serve(
    host: str,
    port: int,
    api_key_file: Path | None,
    origins: tuple[str, ...],
    served_name: str | None,
    batch_size: int,
    queue: int,
    memory_budget: int | None,
    time_limit: float,
    drain: float,
    log_prompts: bool,
    quiet: bool,
    force: bool,
    models: ModelOptions,
    reward: str | None,
    **options: Any,
) -> None:
    """Serve a pair to any client of OpenAI's protocol, at /v1, and a page to try it, at /.

    Options of the method are defaults: a request may have others.
    """
    try:
        from specguard.serve.server import Address, log_to_stderr, read_keys
        from specguard.serve.server import serve as run
    except ImportError as error:
        raise UsageError(
            f"the server's packages are not installed: {error.name}",
            "pip install 'specguard[serve]'",
        ) from error
    if quiet and log_prompts:
        raise UsageError("--quiet and --log-prompts exclude one another")
    keys = read_keys(api_key_file) if api_key_file else ()
    address = Address(host, port, keys, origins)
    limits = Limits(
        running=batch_size,
        waiting=queue,
        memory=None if memory_budget is None else memory_budget * 2**20,
        seconds=time_limit,
        drain_seconds=drain,
    )
    with address.bind() as bound:
        reporter = Reporter(is_quiet=quiet)
        with reporter.loading() as progress:
            choice = models.choose()
            check = choice.pair.check if choice.pair else None
            if force and check is None:
                raise UsageError("--force has no meaning: these models take any problem")
            settings = settings_from({**options, "reward": reward}, choice)
            solver = replace(models, pair=choice.pair.name if choice.pair else None).load(
                reward=reward, progress=progress, **settings
            )
        reporter.start(solver, choice)
        if not quiet:
            log_to_stderr()
        name = served_name or (choice.pair.name if choice.pair else None)
        run(
            solver,
            name or Path(choice.target or choice.draft or BUILT_IN_PAIR).name,
            address,
            bound,
            limits,
            check=check,
            is_forced=force,
            logs_prompts=log_prompts,
            begun=lambda url: click.echo(
                f"Listening at {url}/v1; a page to try it: {url}/", err=True
            ),
        )
