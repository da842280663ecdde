"""``specguard bench``: compare methods on one machine, in one run that can be resumed."""

from dataclasses import replace
from pathlib import Path
from textwrap import fill
from typing import Any

import click
from click.core import ParameterSource
from rich.markup import escape

from specguard import UsageError
from specguard.bench.methods import AS_SOLVED, choose_methods, known_methods
from specguard.cli.data import data_options, read_data
from specguard.cli.groups import Group
from specguard.cli.model_options import ModelOptions, model_options
from specguard.cli.output import console, print_notes, progress_bar
from specguard.cli.values import COUNT, SEED, Several
from specguard.core import SolveConfig, Solver, SpecguardError
from specguard.files import check_output_folder, write_atomically

_INDENTED: Any = {"initial_indent": "  ", "subsequent_indent": "  ", "break_on_hyphens": False}
_DEFAULT_METHODS = "target,draft,sd,specguard,paper"


@click.group(
    cls=Group,
    invoke_without_command=True,
    epilog="\b\nMethods:\n" + fill(", ".join(known_methods(SolveConfig())), 70, **_INDENTED),
)
@model_options
@click.option(
    "--methods",
    default=_DEFAULT_METHODS,
    help="Separated by commas; NAME@K is one with K candidates, or K samples to choose "
    "from; NAME@=METHOD with as many as come nearest to the time of METHOD.",
)
@data_options
@click.option("--seeds", type=Several(SEED), default="0", help="Separated by commas.")
@click.option(
    "--batch-size",
    type=COUNT,
    default=1,
    help="Problems at a time; times are then shares of a batch.",
)
@click.option(
    "--memory-budget",
    type=COUNT,
    metavar="MIB",
    help="Most memory for the keys and values of a batch; problems wait until there is room.",
)
@click.option("--reward", metavar="MODEL", show_default="the pair's", help="Process reward model.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the results; a run in it goes on.",
)
@click.pass_context
def bench(
    ctx: click.Context,
    models: ModelOptions,
    methods: str,
    dataset: str | None,
    data: Path | None,
    fields: str | None,
    limit: int | None,
    seeds: tuple[int, ...],
    batch_size: int,
    memory_budget: int | None,
    reward: str | None,
    output: Path | None,
) -> None:
    """Compare methods on a data set.

    Accuracy, latency, acceptance, and what the target had to do. Results are appended to OUTPUT as
    each problem ends; the same command goes on where a run was stopped, and more problems, methods
    or seeds may be added.
    """
    if ctx.invoked_subcommand is not None:
        _refuse_options(ctx)
        return
    if output is None:
        raise click.MissingParameter(ctx=ctx, param_hint="'--output'", param_type="option")
    if memory_budget is not None and batch_size == 1:
        raise UsageError("--memory-budget has no meaning without a --batch-size")
    names = tuple(filter(None, map(str.strip, methods.split(","))))
    if not choose_methods(names, SolveConfig()):  # an unknown one is refused before any work
        raise UsageError("no method is given", "see specguard bench --help")
    check_output_folder(output)
    items = read_data(dataset, data, fields, limit)
    try:
        from specguard.bench.runner import Run
    except ImportError as error:
        raise SpecguardError(
            f"the package {error.name} is not installed", "pip install 'specguard[bench]'"
        ) from error
    err = console(stderr=True)
    asks_cost = any(name.partition("@")[0] in AS_SOLVED for name in names)
    solver = models.load() if asks_cost else models.load(draft_cost=None)
    print_notes(solver, err)
    chosen = choose_methods(names, solver.config)
    if any(method.needs_reward for method in chosen):
        solver.pair = replace(solver.pair, reward=models.load_reward(reward))
    elif reward is not None:
        raise UsageError("--reward has no meaning: none of the methods asks a reward model")
    budget = None if memory_budget is None else memory_budget * 2**20
    backend = models.choose().backend
    run = Run(solver, items, chosen, seeds, output, backend, batch_size, budget)
    try:
        _work(run, err)
    finally:
        run.close()
    _report(run.rows, solver, output)


def _refuse_options(ctx: click.Context) -> None:
    """Options of a comparison mean nothing to a sub-command."""
    for option in ctx.command.params:
        if ctx.get_parameter_source(str(option.name)) is ParameterSource.COMMANDLINE:
            raise UsageError(
                f"{option.opts[0]} stands before {ctx.invoked_subcommand!r}",
                f"options of {ctx.invoked_subcommand} go behind it",
            )


def _work(run: Any, err: Any) -> None:
    total = run.num_missing
    right: dict[str, list[bool]] = {}
    for row in run.rows:
        right.setdefault(row["method"], []).append(row["is_right"])
    with progress_bar(err) as progress:
        task = progress.add_task("", total=total)
        for row in run.rows_to_come():
            right.setdefault(row["method"], []).append(row["is_right"])
            shares = (
                f"{name} {sum(outcomes) / len(outcomes):.0%}" for name, outcomes in right.items()
            )
            progress.update(task, advance=1, description=", ".join(shares))
    errors = [error for row in run.rows for error in row["errors"]]
    if errors:
        err.print(
            f"{len(errors)} solutions came to nothing; the first: {escape(errors[0])}",
            style="yellow",
        )


def _report(rows: list[dict[str, Any]], solver: Solver, output: Path) -> None:
    from specguard.bench.plot import plot
    from specguard.bench.report import as_csv, as_markdown, summarise

    lines = summarise(rows, _num_parameters(solver))
    table = as_markdown(lines)
    files = {
        "report.md": table.encode(),
        "report.csv": as_csv(lines).encode(),
        "frontier.png": plot(lines, "png"),
        "frontier.svg": plot(lines, "svg"),
    }
    try:
        for name, content in files.items():
            write_atomically(output / name, content)
    except OSError as error:
        raise SpecguardError(
            f"the report in {output} cannot be written: {error.strerror}",
            "the results are kept: the same command writes it anew",
        ) from error
    click.echo(table, nl=False)


def _num_parameters(solver: Solver) -> tuple[int, int]:
    from specguard.backends.checkpoint import open_model

    counts = [
        open_model(model.name).num_parameters if model is not None else 0
        for model in (solver.draft, solver.target)
    ]
    return counts[0], counts[1]
