"""``specguard bench speed``: what a pair's models can do here, and what speculation makes of it."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice

import click
from rich.progress import Progress

from specguard.bench.speed import Speed, SpeedRun
from specguard.bench.tables import as_table, machine, machine_line
from specguard.cli.model_options import ModelOptions, model_options
from specguard.cli.output import console, print_notes
from specguard.cli.values import CANDIDATES, COUNT, SHARE, Several

# What stands below the tables; docs/measurements.md says how the terms make up a token's time.
LEGEND = """\
verbs: prefill reads the prompt, decode writes a token, verify reads k candidates of the draft,
  read goes on from a step that the other model wrote
t_d(k), t_t: ms of a decode step of the draft for k candidates, and of the target
v, s: ms of the verifying pass, and of the draft's reading of a rewritten step
n, n_max, n_r: tokens of the mean step, of its longest candidate, and written by the target in a
  rejected step; r: share of rejected steps
ideal: the least that a token can take with these; ratio: measured to ideal; outside models: share
  of the time in which neither model worked
speed-ups are over the target alone: without / with the reading of the prompt
"""


@click.command()
@model_options
@click.option(
    "--k",
    "counts",
    type=Several(CANDIDATES),
    default="1,4,16",
    help="Candidates, separated by commas.",
)
@click.option(
    "--acceptance",
    "acceptances",
    type=Several(SHARE),
    default="0.5,0.7,0.9",
    help="Shares of accepted steps to predict at, beside the measured one.",
)
@click.option("--count", type=COUNT, default=20, help="Problems to solve.")
@click.option(
    "--cpu-time",
    is_flag=True,
    help="Count the process's CPU time, not the clock's: on a busy CPU, for models on that CPU.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object in place of the tables.")
def speed(
    models: ModelOptions,
    counts: tuple[int, ...],
    acceptances: tuple[float, ...],
    count: int,
    cpu_time: bool,
    as_json: bool,
) -> None:
    """Measure both models here, and the speed-up that comes of it.

    Rates of both, the speed-up that they allow, and the one that is measured. The built-in held-out
    problems are solved by the target alone and with each number of candidates in turn; before that,
    the verbs of both models are timed on the same problem. What drafting costs is measured anew,
    and kept for solve.
    """
    from specguard.models.tiny import problems

    clock = time.process_time if cpu_time else time.perf_counter
    err = console(stderr=True)
    solver = models.load(remeasure=True)  # and keeps the figures for `solve`
    print_notes(solver, err)
    run = SpeedRun(solver, counts, clock)
    texts = [problem.text for problem in islice(problems.stream(problems.HELD_OUT), count)]
    with Progress(console=err, disable=not err.is_terminal) as progress:
        run.warm_up(texts[0])
        for text in progress.track(texts, description="solving"):
            run.add(text)
    found = run.report(acceptances)
    about = {
        **machine(),
        "backend": models.choose().backend,
        "time": "CPU time" if cpu_time else "wall clock",
    }
    if as_json:
        cost = solver.config.draft_cost
        draft_cost = None if cost is None else asdict(cost)
        click.echo(json.dumps({"machine": about, "draft_cost": draft_cost, **asdict(found)}))
        return
    click.echo(f"{machine_line(about)}; {found.num_problems} problems, medians over problems.\n")
    click.echo(rates_table(found))
    click.echo(costs_table(found))
    click.echo(speed_ups_table(found))
    click.echo(LEGEND, nl=False)


def rates_table(found: Speed) -> str:
    """What each model does in a pass."""
    rows = [
        (
            rate.model,
            rate.what,
            str(rate.num_candidates),
            f"{rate.num_tokens:.0f}",
            _ms(rate.seconds),
            _ms(rate.seconds / rate.num_tokens),
            f"{rate.num_tokens / rate.seconds:.0f}",
        )
        for rate in sorted(found.rates, key=lambda rate: (rate.model, rate.what))
    ]
    columns = ("model", "verb", "k", "tokens", "ms", "ms / token", "tokens/s")
    return as_table(columns, rows)


def costs_table(found: Speed) -> str:
    """The terms of the cost model, in ms, and the time a token that they add up to."""
    columns = "k,t_d(k),t_t,v,s,n,n_max,n_r,r,ideal ms / token,measured,ratio,outside models"
    rows: list[Sequence[str]] = [
        (
            str(one.num_candidates),
            *(
                _ms(seconds)
                for seconds in (
                    one.costs.draft_token,
                    one.costs.target_token,
                    one.costs.verify,
                    one.costs.catch_up,
                )
            ),
            f"{one.costs.num_tokens:.1f}",
            f"{one.costs.num_longest:.1f}",
            f"{one.costs.num_rewritten:.1f}",
            f"{one.rejected:.1%}",
            _ms(one.ideal),
            _ms(one.measured),
            f"{one.ratio:.3f}",
            f"{one.outside:.1%}",
        )
        for one in found.outcomes
    ]
    alone = found.outcomes[0].costs.target_token
    target = ["target", "", _ms(alone), *[""] * 6, _ms(alone), _ms(found.target_seconds)]
    rows.append([*target, f"{found.target_ratio:.3f}", ""])
    return as_table(columns.split(","), rows)


def speed_ups_table(found: Speed) -> str:
    """Speed-up over the target alone; behind the stroke with the prompt's reading."""
    names = list(found.outcomes[0].predicted)
    columns = ["k", *(f"predicted at {name}" for name in names), "measured"]
    rows = [
        [
            str(one.num_candidates),
            *(_pair(*one.predicted[name]) for name in names),
            _pair(one.speed_up, one.speed_up_with_prefill),
        ]
        for one in found.outcomes
    ]
    return as_table(columns, rows)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"


def _pair(without: float, with_prefill: float) -> str:
    return f"{without:.2f} / {with_prefill:.2f}"
