"""Thousands of generated command lines: ``python -m benchmarks.reliability.invocations --help``.

Options come from the commands themselves, so a new one is tried as soon as it exists; values are
good, at a limit, or nonsense, and files and checkpoints are spoilt. No command may end with a
traceback, hang, die of a signal, exit with a code that is not documented, refuse without a word, or
leave a half-written file.
"""

import os
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import click
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from benchmarks.reliability.material import PLACES, PROBLEM, SPOILABLE, Material
from benchmarks.reliability.processes import Command, Ended
from benchmarks.served import DRAFT_COST
from specguard.cli.main import main as specguard

_SECONDS = 300.0  # a command that lasts longer hangs
_NAP = 0.1
_GOOD_OF_TEN = 8  # values
_ANSWERLESS = ("solve",)  # commands that may end with 3
_HOMES = ("good", "broken", "file", "closed", "missing")

_NUMBERS = st.sampled_from(
    (
        *("0", "1", "2", "3", "7", "16", "-1", "1e3", "0.5", "0.7", "1.0", "-0.0", "nan", "inf"),
        *("-inf", "1e308", "5e-324", "2147483647", "2147483648", "18446744073709551616", "9" * 400),
        *("", " ", "٣", "0x10", "1_0", "1,2", "two", "1/2", "0/0", "3/16"),
    )
)
_TEXTS = st.one_of(
    st.sampled_from(
        (
            *(PROBLEM, "", " ", "-5 + 3", "--", "\n\n", "What is 17*23?", "\udcff", "🐚" * 50),
            *("x" * 20_000, PROBLEM * 40, "<script>alert(1)</script>", "%s%n", "../../etc/passwd"),
            *("tiny", "qwen3", "mine", "none", "auto", "paper", "problem=problem", "a=b", "bash"),
            *("target,draft", "specguard@2,sd", "specguard@=target", "k=", "=", "block_size=32"),
            "{{ 7*7 }}",
        )
    ),
    st.text(st.characters(exclude_characters="\0"), max_size=30),
)
# What users give; by the name of the parameter.
GOOD = {
    "pair": ["tiny", "tiny", "qwen3"],
    "draft": ["draft"],
    "target": ["target"],
    "tokenizer": ["draft"],
    "backend": ["cpu", "cpu", "auto", "mlx", "cuda", "vllm", "llamacpp"],
    "draft_backend": ["cpu", "mlx"],
    "profile": ["none", "mine"],
    "engine_args": ["block_size=32", "draft.n_ctx=99"],
    "problems": ["problems.jsonl", "problems.txt"],
    "file": ["problems.txt"],
    "data": ["problems.jsonl"],
    "fields": ["problem=problem,answer=answer", "problem=problem", "problem=problem,id=id"],
    "output": ["new", "results"],
    "trace": ["new.html"],
    "shard": ["1/2", "3/3"],
    "methods": ["target,draft", "specguard@2,sd", "specguard@=target", "rsd", "paper"],
    "reward": ["draft", "target"],
    "draft_cost": ["0.4", DRAFT_COST, "measure"],
    "delimiter": ["\n", ".", "\n\n"],
    "system_prompt": ["", "Think."],
    "api_key_file": ["keys"],
    "host": ["127.0.0.1", "0.0.0.0", "::1"],
    "cors_origin": ["https://chat.example.com"],
    "served_name": ["mine"],
}
_VALUES = st.one_of(_NUMBERS, _TEXTS, st.sampled_from(PLACES))


def commands(
    group: click.Group = specguard, path: tuple[str, ...] = ()
) -> dict[str, click.Command]:
    """Every command by its name, groups that do something of themselves included."""
    found: dict[str, click.Command] = {}
    for name, command in group.commands.items():
        here = (*path, name)
        if isinstance(command, click.Group):
            found.update(commands(command, here))
            if not command.invoke_without_command:
                continue
        found[" ".join(here)] = command
    return found


@dataclass(frozen=True, slots=True)
class Invocation:
    """A command line, what stands on its standard input, and what is spoilt before it."""

    command: str
    arguments: tuple[str, ...]
    stdin: bytes
    spoilt: tuple[tuple[str, bytes], ...]
    home: str


@st.composite
def invocations(draw: st.DrawFn, material: Material) -> Invocation:
    """Command lines of which perhaps a third get as far as loading models."""
    every = commands()
    name = draw(st.sampled_from(sorted(every)))
    arguments: list[str] = []
    params = [
        param
        for param in every[name].params
        if isinstance(param, click.Option) and not param.is_eager
    ]
    for option in draw(st.lists(st.sampled_from(params), max_size=3)) if params else ():
        arguments.append(draw(st.sampled_from([*option.opts, *option.secondary_opts])))
        if not (option.is_flag or option.count):
            arguments.append(draw(_mostly(_good_values_of(option))))
    for argument in every[name].params:
        if isinstance(argument, click.Argument):
            count = draw(st.sampled_from([*[1] * 8, 0, 2]))
            arguments += [draw(_mostly(_argument_of(name, argument))) for _ in range(count)]
    if draw(st.integers(0, 19)) == 0:
        arguments.insert(draw(st.integers(0, len(arguments))), draw(_VALUES))
    files = st.lists(st.sampled_from(SPOILABLE), max_size=2, unique=True)
    spoilt = tuple((file, draw(_spoilt(material.content(file)))) for file in draw(files))
    if any(file.startswith(("draft/", "target/")) for file, _ in spoilt) and draw(st.booleans()):
        pair = [param for param in params if param.name in ("draft", "target")]
        arguments += [part for option in pair for part in (option.opts[0], str(option.name))]
    stdin = draw(st.sampled_from([b"", PROBLEM.encode(), b"\0", b"\xff\xfe", b"x" * 100_000]))
    home = draw(st.sampled_from([*["good"] * 8, *_HOMES]))
    return Invocation(name, (*_bounded(name), *arguments), stdin, spoilt, home)


def _mostly(good: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """These, and now and then anything."""
    return st.integers(0, 9).flatmap(lambda drawn: good if drawn < _GOOD_OF_TEN else _VALUES)


def _good_values_of(option: click.Option) -> st.SearchStrategy[str]:
    good: list[str] = GOOD.get(str(option.name), ["1", "2"])
    if isinstance(option.type, click.Choice):
        good = list(map(str, option.type.choices))
    elif isinstance(option.type, click.types.FloatRange):
        good = ["0", "0.5", "1"]
    return st.sampled_from(good)


def _argument_of(command: str, argument: click.Argument) -> st.SearchStrategy[str]:
    if command == "trace":
        return st.sampled_from(["solution.json", *PLACES])
    if command == "solve":
        return st.just(PROBLEM)
    if isinstance(argument.type, click.Choice):
        return st.sampled_from(list(map(str, argument.type.choices)))
    return st.sampled_from(["tiny", "qwen3", "mine", "owner/name"])


def _spoilt(content: bytes) -> st.SearchStrategy[bytes]:
    """The content cut, with bits or bytes changed, with something else in it, or of another."""
    places = st.integers(0, max(0, len(content) - 1))
    head = st.integers(0, min(len(content), 2000))  # where headers are

    def flip(where: int, bit: int) -> bytes:
        changed = bytearray(content or b"\0")
        changed[min(where, len(changed) - 1)] ^= 1 << bit
        return bytes(changed)

    odd = st.sampled_from(
        [b"\0", b"\xff", b"null", b"1e999", b"-1", b"[]", b"{}", b'"\\ud800"', b""]
    )
    return st.one_of(
        st.builds(lambda where: content[:where], st.one_of(head, places)),
        st.builds(flip, st.one_of(head, places), st.integers(0, 7)),
        st.builds(
            lambda where, put, cut: content[:where] + put + content[where + cut :],
            head,
            odd,
            st.integers(0, 40),
        ),
        st.sampled_from([b"", b"{}", b"[]", b"null", b"\xff\xfe", b"[" * 10_000, b"\0" * 64]),
    )


def _bounded(command: str) -> tuple[str, ...]:
    """What keeps a good command from lasting: given first, so that what is drawn prevails."""
    if command in ("bench", "calibrate"):
        return "--limit", "1"
    if command == "bench speed":
        return "--count", "1", "--k", "1"
    if command == "serve":
        return "--port", "0"
    return ("--draft-cost", DRAFT_COST) if command in ("solve", "chat") else ()


@dataclass(slots=True)
class Tally:
    """What came of the invocations: exit codes by command, and what should not have been."""

    codes: Counter[tuple[str, int | None]] = field(default_factory=Counter)
    failures: list[tuple[Invocation, str, Ended]] = field(default_factory=list)
    slowest: float = 0.0


def complaint(invocation: Invocation, ended: Ended, partial: list[Path]) -> str | None:
    """What is wrong with how it ended."""
    documented = {0, 1, 2, *([3] if invocation.command in _ANSWERLESS else ())}
    if ended.code is None:
        return "hung"
    if ended.has_traceback:
        return "traceback"
    if ended.code not in documented:
        return f"exit code {ended.code}"
    if ended.code in (1, 2) and not ended.stderr.strip():
        return f"exit code {ended.code} without a word"
    if partial:
        return f"left {partial[0].name}"
    return None


def try_out(
    invocation: Invocation, material: Material, homes: Path, scratch: Path
) -> tuple[Ended, str | None]:
    """Run it, and bring the folder back to what it was."""
    for name, content in invocation.spoilt:
        material.spoil(name, content)
    arguments = [*invocation.command.split(), *invocation.arguments]
    command = Command(
        arguments,
        scratch,
        stdin=invocation.stdin,
        environment=_home(homes, invocation.home),
        directory=material.folder,
    )
    try:
        while invocation.command == "serve" and (ended := command.wait(_NAP)) is None:
            if b"Listening at" in command.errors():
                command.stop(signal.SIGTERM)
                break
        ended = command.finish(_SECONDS)
        return ended, complaint(invocation, ended, material.partial_files())
    finally:
        material.restore()


def _home(homes: Path, kind: str) -> Mapping[str, str]:
    """Folders of settings and caches: usable ones, or in one of the ways in which they are not."""
    place = homes / kind
    if kind in ("good", "broken"):
        (place / "config").mkdir(parents=True, exist_ok=True)
        if kind == "broken":
            for name in "settings.toml", "config.toml", "profiles", "costs.json":
                (place / "config" / name).write_bytes(b"\xff[[broken = ")
    elif kind == "file":
        place.write_bytes(b"")
    elif kind == "closed" and not place.exists():
        place.mkdir(mode=0o500)
    return {
        "SPECGUARD_CONFIG_DIR": f"{place / 'config'}",
        "SPECGUARD_CACHE_DIR": f"{place / 'cache'}",
    }


def run(number: int, first_seed: int, names: list[str]) -> Tally:
    """Try out so many; ``names`` are the only commands, if any are named."""
    tally = Tally()
    with tempfile.TemporaryDirectory() as kept:
        homes, scratch, folder = (Path(kept) / name for name in ("homes", "scratch", "folder"))
        for made in homes, scratch, folder:
            made.mkdir()
        os.chdir(folder)
        first = Command(
            ["solve", "--json", "--detail", PROBLEM], scratch, environment=_home(homes, "good")
        )
        material = Material(folder, first.finish(_SECONDS).stdout)

        @seed(first_seed)
        @settings(
            max_examples=number,
            phases=[Phase.generate],
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(invocations(material))
        def try_one(invocation: Invocation) -> None:
            if names and invocation.command not in names:
                return
            ended, wrong = try_out(invocation, material, homes, scratch)
            tally.codes[invocation.command, ended.code] += 1
            tally.slowest = max(tally.slowest, ended.seconds)
            if wrong is not None:
                tally.failures.append((invocation, wrong, ended))
                click.echo("".join(_told(invocation, wrong, ended)), err=True)
            if tally.codes.total() % 500 == 0:
                click.echo(f"{tally.codes.total()}, {len(tally.failures)} failures", err=True)

        try_one()
        material.folder.joinpath("closed").chmod(0o700)
        os.chdir("/")
    return tally


def _told(invocation: Invocation, wrong: str, ended: Ended) -> Iterator[str]:
    shown = [argument[:60] for argument in invocation.arguments]
    yield f"{wrong}: {invocation.command} {shown!r}, home {invocation.home}, "
    yield f"stdin {invocation.stdin[:20]!r}, spoilt "
    yield f"{[(name, content[:60], len(content)) for name, content in invocation.spoilt]!r}\n"
    yield ended.stderr.decode(errors="replace")[-1500:] + "\n"


@click.command(context_settings={"show_default": True})
@click.option("--number", type=click.IntRange(min=1), default=10_000)
@click.option("--seed", "first_seed", type=int, default=0)
@click.option(
    "--command",
    "names",
    multiple=True,
    type=click.Choice(sorted(commands())),
    help="These alone.",
)
def main(number: int, first_seed: int, names: tuple[str, ...]) -> None:
    """Try generated command lines; exit 1 where one ends as none should."""
    tally = run(number, first_seed, list(names))
    for name in sorted({name for name, _ in tally.codes}):
        counts = {
            code: count for (of, code), count in sorted(tally.codes.items(), key=str) if of == name
        }
        click.echo(f"| {name} | {sum(counts.values())} | {counts} |")
    click.echo(
        f"{tally.codes.total()} invocations, {len(tally.failures)} failures; "
        f"the longest took {tally.slowest:.1f} s."
    )
    if tally.failures:
        raise click.exceptions.Exit(1)


if __name__ == "__main__":
    main()
