"""Many problems at once against servers: ``python -m benchmarks.in_flight --help``.

Are the servers busy all the time, by their own count, and what does our process cost beside them?
"""

import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import click
import psutil

from specguard import SpecguardError
from specguard.bench.tables import as_table, machine, machine_line

_INTERVAL = 0.5  # seconds
# What vLLM's servers say of themselves under /metrics.
_RUNNING, _WAITING = "vllm:num_requests_running", "vllm:num_requests_waiting"


@dataclass(frozen=True, slots=True)
class Sample:
    """Requests that each server works on or has waiting, and what our process has used so far."""

    seconds: float
    requests: tuple[int, ...]
    cpu_seconds: float


def requests_in(page: str) -> int:
    """Running and waiting requests, from a server's page of metrics."""
    found = [
        float(line.rsplit(" ", 1)[1])
        for line in page.splitlines()
        if line.startswith((_RUNNING + "{", _WAITING + "{"))
    ]
    if not found:
        raise SpecguardError("the server says nothing of its requests: it is none of vLLM's")
    return int(sum(found))


def watch(command: Sequence[str], urls: Sequence[str]) -> list[Sample]:
    """Run a command to its end, and look at it and at the servers meanwhile.

    Raises:
        SpecguardError: the command failed, or a server has no metrics.
    """
    samples = []
    started = time.perf_counter()
    process = psutil.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            counts = []
            for url in urls:
                with urllib.request.urlopen(f"{url.rstrip('/')}/metrics", timeout=60) as page:
                    counts.append(requests_in(page.read().decode()))
            try:
                used = process.cpu_times()
            except psutil.NoSuchProcess:
                break
            seconds = time.perf_counter() - started
            samples.append(Sample(seconds, tuple(counts), used.user + used.system))
            time.sleep(_INTERVAL)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    if process.returncode:
        raise SpecguardError(f"specguard ended with {process.returncode}")
    return samples


def table(samples: Sequence[Sample], urls: Sequence[str]) -> str:
    """What the servers and our process did, from the first request to the last one."""
    busy = [place for place, sample in enumerate(samples) if sum(sample.requests)]
    if len(busy) < 2:
        raise SpecguardError("the servers were hardly asked anything", "give more problems")
    begun, ended = samples[busy[0]], samples[busy[-1]]
    within = samples[busy[0] : busy[-1] + 1]
    seconds = ended.seconds - begun.seconds
    rows = [
        (url, f"{mean(each.requests[place] > 0 for each in within):.1%} of the time, "
         f"{mean(each.requests[place] for each in within):.1f} requests")
        for place, url in enumerate(urls)
    ]  # fmt: skip
    if len(urls) > 1:
        rows.append(("any of them", f"{mean(sum(each.requests) > 0 for each in within):.1%}"))
    share = (ended.cpu_seconds - begun.cpu_seconds) / seconds
    rows.append(("our process", f"{share:.1%} of a core, over {seconds:.0f} s"))
    return as_table(("what", "busy"), rows)


@click.command(context_settings={"show_default": True, "ignore_unknown_options": True})
@click.option("--draft", required=True, help="URL of a vLLM server.")
@click.option("--target", required=True, help="URL of another one.")
@click.option("--problems", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--batch-size", default=64, help="Problems in flight.")
@click.argument("options", nargs=-1)
def main(
    draft: str,
    target: str,
    problems: Path,
    output: Path,
    batch_size: int,
    options: tuple[str, ...],
) -> None:
    """Have `specguard solve --problems` solve a file's problems; OPTIONS behind -- go to it."""
    command = [sys.executable, "-m", "specguard", "solve"]
    command += ["--problems", str(problems), "--output", str(output)]
    command += ["--draft", draft, "--target", target, "--batch-size", str(batch_size), *options]
    urls = [draft, target]
    samples = watch(command, urls)
    click.echo(f"{machine_line(machine())}; {batch_size} problems at a time.\n")
    click.echo(table(samples, urls), nl=False)


if __name__ == "__main__":
    main()
