"""Kill -9 at any moment: ``python -m benchmarks.reliability.kills --help``.

A command is killed again and again, each time at a random moment of what it takes undisturbed, and
run anew in the same place until it ends of itself; then it begins in an empty one. What a run had
finished must be there after the next one, once, and equal to that of an undisturbed run; no
half-written file, lock or process may stay. Before all this, two runs at once in one place are
tried: the second is to be refused.
"""

import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.reliability.hub import REPOS, hub
from benchmarks.reliability.processes import Command, Ended
from benchmarks.served import DRAFT_COST, texts
from specguard import SpecguardError
from specguard.bench.datasets import load_dataset

_SECONDS = 300.0
# Problems of the built-in data set on whose steps the draft errs: a few are enough to fit to.
_ERRING = (0, 2, 3, 14, 18, 19, 26, 28)
_ORPHANS = 10.0  # seconds that processes without their parent may take to notice


@dataclass(frozen=True, slots=True)
class Scenario:
    """A command that makes something in the folder ``place``, and how to read what is finished.

    ``finished`` gives what is whole by name, without what differs from run to run.
    """

    arguments: Callable[[Path], list[str]]
    finished: Callable[[Path], dict[str, str]]
    refuses_a_second: bool = True


def _rows(
    *parts: str, of: tuple[str, ...], key: tuple[str, ...]
) -> Callable[[Path], dict[str, str]]:
    """Rows of a file of JSON lines; a last one that is not whole is not finished."""

    def finished(place: Path) -> dict[str, str]:
        file = place.joinpath(*parts)
        data = file.read_bytes() if file.exists() else b""
        found: dict[str, str] = {}
        for line in data[: data.rfind(b"\n") + 1].splitlines():
            row = json.loads(line)
            if key[0] not in row:  # settings
                continue
            name = " ".join(str(row[part]) for part in key)
            if name in found:
                raise SpecguardError(f"{name} is in {file.name} twice")
            found[name] = json.dumps([_without_times(row[part]) for part in of])
        return found

    return finished


def _without_times(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_times(part) for name, part in value.items() if "second" not in name}
    return [_without_times(part) for part in value] if isinstance(value, list) else value


def _downloaded(place: Path) -> dict[str, str]:
    """Files of the models that a user could load."""
    found = {}
    for repo in REPOS:
        folder = place / "hub" / f"models--{repo.replace('/', '--')}" / "snapshots"
        for file in folder.glob("*/*"):
            is_whole = file.read_bytes() == (REPOS[repo] / file.name).read_bytes()
            found[f"{repo}/{file.name}"] = "whole" if is_whole else "damaged"
    return found


def write_problems(folder: Path) -> None:
    """What the commands are given: ``problems.txt`` to solve, ``erring.jsonl`` to fit to."""
    (folder / "problems.txt").write_text("\n".join(texts(12)))
    items = load_dataset("tiny", limit=max(_ERRING) + 1).items
    rows = ({"problem": items[index].problem, "answer": items[index].answer} for index in _ERRING)
    (folder / "erring.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def scenarios(folder: Path) -> dict[str, Scenario]:
    """The commands that are killed; ``folder`` has the problems."""
    solve = [
        "solve",
        "--problems",
        str(folder / "problems.txt"),
        "--batch-size",
        "3",
        "--draft-cost",
        DRAFT_COST,
        "--output",
    ]
    bench = ["bench", "--dataset", "tiny", "--limit", "4", "--methods", "target,sd", "--output"]
    fit = ["calibrate", "killed", "--data", str(folder / "erring.jsonl"), "--k", "2"]
    fit += ["--fields", "problem=problem,answer=answer"]
    return {
        "solve --problems": Scenario(
            lambda place: [*solve, str(place / "out")],
            _rows("out", "solutions.jsonl", of=("text", "finish_reason"), key=("id",)),
        ),
        "bench": Scenario(
            lambda place: [*bench, str(place / "out")],
            _rows(
                "out", "results.jsonl", of=("answer", "num_tokens"), key=("method", "seed", "id")
            ),
        ),
        "calibrate": Scenario(
            lambda _: fit,
            _rows("config", "profiles", "killed.jsonl", of=("steps",), key=("id",)),
        ),
        "models pull": Scenario(lambda _: ["models", "pull", *REPOS], _downloaded, False),
    }


@dataclass(slots=True)
class Tally:
    """What came of the kills."""

    kills: int = 0
    whole_runs: int = 0
    kept: int = 0  # finished pieces that a kill found there
    failures: list[str] = field(default_factory=list)


class Trial:
    """Kills one scenario in a place of its own."""

    def __init__(self, scenario: Scenario, place: Path, scratch: Path, seed: int) -> None:
        self.scenario, self.place, self.scratch = scenario, place, scratch
        self.tally = Tally()
        self._rng = np.random.default_rng(seed)
        self._undisturbed: dict[str, str] = {}
        self._seconds = 0.0
        self._files: set[str] = set()

    def run(self, kills: int) -> Tally:
        """Kill it so many times."""
        self._learn()
        if self.scenario.refuses_a_second:
            self._try_two()
        while self.tally.kills < kills:
            self._kill_until_it_ends(kills)
        return self.tally

    def _learn(self) -> None:
        """What an undisturbed run makes, and how long it takes."""
        ended = self._begin().finish(_SECONDS)
        if ended.code != 0:
            raise SpecguardError(f"it does not run: {ended.stderr.decode()}")
        self._seconds = ended.seconds
        self._undisturbed = self.scenario.finished(self.place)
        self._files = self._all_files()
        self._clear()

    def _try_two(self) -> None:
        first = self._begin()
        while first.wait(0.01) is None and not self._all_files():
            pass
        first.stop(signal.SIGSTOP)
        second = self._begin(self.scratch / "second").finish(_SECONDS)
        first.stop(signal.SIGCONT)
        if second.code != 1 or b"another run is writing" not in second.stderr:
            self.tally.failures.append(f"a second run: {second.code} {second.stderr.decode()}")
        self._check_whole(first.finish(_SECONDS))
        self._clear()

    def _kill_until_it_ends(self, kills: int) -> None:
        before: dict[str, str] = {}
        while True:
            command = self._begin()
            is_last = self.tally.kills >= kills
            ended = command.wait(_SECONDS if is_last else self._rng.uniform(0, self._seconds))
            if ended is not None:
                self._check_whole(ended)
                break
            command.stop()
            command.wait(_SECONDS)
            self.tally.kills += 1
            if command.leaves_others(_ORPHANS):
                self.tally.failures.append("processes were left")
            now = self._finished()
            self._check_kept(before, now)
            self.tally.kept += len(now)
            before = now
        self._clear()

    def _finished(self) -> dict[str, str]:
        try:
            return self.scenario.finished(self.place)
        except (SpecguardError, ValueError) as error:
            self.tally.failures.append(str(error))
            return {}

    def _check_kept(self, before: dict[str, str], now: dict[str, str]) -> None:
        lost = before.keys() - now.keys()
        wrong = [name for name, value in now.items() if self._undisturbed.get(name) != value]
        if lost or wrong:
            self.tally.failures.append(f"lost: {sorted(lost)}; not as undisturbed: {wrong}")

    def _check_whole(self, ended: Ended) -> None:
        """A run that was let be."""
        self.tally.whole_runs += 1
        if ended.code != 0:
            self.tally.failures.append(f"exit code {ended.code}: {ended.stderr.decode()[-600:]}")
        self._check_kept(self._undisturbed, self._finished())
        if more := self._all_files() - self._files:
            self.tally.failures.append(f"files stayed: {sorted(more)}")

    def _begin(self, scratch: Path | None = None) -> Command:
        (scratch or self.scratch).mkdir(exist_ok=True)
        environment = {
            "SPECGUARD_CONFIG_DIR": str(self.place / "config"),
            "SPECGUARD_CACHE_DIR": str(self.scratch / "cache"),
        }
        arguments = self.scenario.arguments(self.place)
        return Command(arguments, scratch or self.scratch, environment=environment)

    def _all_files(self) -> set[str]:
        return {
            str(path.relative_to(self.place)) for path in self.place.rglob("*") if not path.is_dir()
        }

    def _clear(self) -> None:
        for path in self.place.iterdir():
            shutil.rmtree(path)


@click.command(context_settings={"show_default": True})
@click.option("--kills", type=click.IntRange(min=1), default=300, help="Of each command.")
@click.option("--seed", type=int, default=0)
@click.option(
    "--only",
    "names",
    multiple=True,
    type=click.Choice(list(scenarios(Path()))),
    help="These commands alone.",
)
def main(kills: int, seed: int, names: tuple[str, ...]) -> None:
    """Kill commands at random moments; exit 1 where anything is lost, repeated or left behind."""
    is_fine = True
    with tempfile.TemporaryDirectory() as kept, hub() as address:
        folder = Path(kept)
        write_problems(folder)
        # The library that downloads reads these as it is imported.
        os.environ.update(
            HF_ENDPOINT=address, HF_HUB_CACHE=str(folder / "place" / "hub"), HF_HUB_OFFLINE="0"
        )
        (folder / "place").mkdir()
        for name, scenario in scenarios(folder).items():
            if names and name not in names:
                continue
            scratch = Path(tempfile.mkdtemp(dir=folder))
            tally = Trial(scenario, folder / "place", scratch, seed).run(kills)
            is_fine = is_fine and not tally.failures
            click.echo(
                f"{name}: {tally.kills} kills, {tally.kept} finished pieces found after them, "
                f"{tally.whole_runs} runs to the end, {len(tally.failures)} failures"
            )
            for failure in tally.failures[:10]:
                click.echo(f"  {failure}")
    if not is_fine:
        raise click.exceptions.Exit(1)


if __name__ == "__main__":
    main()
