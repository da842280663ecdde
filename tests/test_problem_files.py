"""Many problems from a file: each solved once, on the disk at once, whatever stops the run."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import specguard
from specguard.cli.main import main
from specguard.core import Solution, SpecguardError
from specguard.models.tiny import grammar, problems
from specguard.problems import Problem, Shard, read_problems

COST = "--draft-cost=0.4"  # nothing is measured


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["solve", COST, *arguments], catch_exceptions=False)


def held_out(number: int) -> list[str]:
    texts: list[str] = []
    for problem in problems.stream(problems.HELD_OUT):
        try:
            grammar.check(problem.text)
        except SpecguardError:
            continue
        texts.append(problem.text)
        if len(texts) == number:
            return texts
    raise AssertionError


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return held_out(6)


@pytest.fixture
def file(tmp_path: Path, texts: list[str]) -> Path:
    path = tmp_path / "problems.jsonl"
    rows = [{"question": text, "key": f"k{number}"} for number, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(*files: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


FIELDS = "--fields=problem=question,id=key"


def test_each_solution_is_a_line_that_reads_as_one(file: Path, texts: list[str]) -> None:
    result = invoke("--problems", str(file), FIELDS)
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert {row["id"]: row["problem"] for row in rows} == {
        f"k{number}": text for number, text in enumerate(texts)
    }
    alone = specguard.load(draft_cost=specguard.core.DraftCost(0.4))
    for row in rows:
        solution = Solution.from_dict(row)
        assert solution.text == alone.solve(row["problem"]).text
    assert "6 of 6 solved" in result.stderr
    assert result.exit_code == 0


def test_lines_of_text_are_problems_and_answers_come_in_their_order(
    tmp_path: Path, texts: list[str]
) -> None:
    path = tmp_path / "problems.txt"
    path.write_text("\ufeff" + "\n\n".join(texts), encoding="utf-8")
    result = invoke("--problems", str(path), "--quiet", "--batch-size", "4")
    solver = specguard.load()
    assert result.stdout.splitlines() == [solver.solve(text).answer for text in texts]


def test_a_run_goes_on_with_what_is_missing(
    file: Path, tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    short = tmp_path / "short.jsonl"
    short.write_text("\n".join(file.read_text().splitlines()[:2]))
    assert invoke("--problems", str(short), FIELDS, "--output", str(folder)).exit_code == 0
    first = (folder / "solutions.jsonl").read_text()
    with (folder / "solutions.jsonl").open("a") as stream:
        stream.write('{"id": "k2", "cut')  # a process was killed here
    result = invoke("--problems", str(file), FIELDS, "--output", str(folder))
    assert "6 of 6 solved, 2 of them before" in result.stderr
    assert (folder / "solutions.jsonl").read_text().startswith(first)
    assert sorted(row["id"] for row in rows_of(folder / "solutions.jsonl")) == [
        f"k{number}" for number in range(6)
    ]
    # Nothing is missing: no model is loaded.
    monkeypatch.setattr("specguard.cli.model_options.load", None)
    result = invoke("--problems", str(file), FIELDS, "--output", str(folder))
    assert "6 of 6 solved, 6 of them before" in result.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["solutions.jsonl"]


def test_shards_are_disjoint_and_a_run_without_them_adds_nothing(
    file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    for part in "1/3", "2/3", "3/3":
        result = invoke("--problems", str(file), FIELDS, "--output", str(folder), "--shard", part)
        assert result.exit_code == 0, result.stderr
    files = sorted(folder.iterdir())
    assert [path.name for path in files] == [f"solutions-{i}-of-3.jsonl" for i in (1, 2, 3)]
    assert sorted(row["id"] for row in rows_of(*files)) == [f"k{number}" for number in range(6)]
    result = invoke("--problems", str(file), FIELDS, "--output", str(folder))
    assert "6 of 6 solved, 6 of them before" in result.stderr
    assert sorted(folder.iterdir()) == files


def test_parts_of_any_number_cover_every_problem_once() -> None:
    all_problems = [Problem(str(number), "p") for number in range(10)]
    for num_parts in range(1, 13):
        parts = [Shard(number, num_parts).of(all_problems) for number in range(1, num_parts + 1)]
        assert sorted(
            (problem for part in parts for problem in part), key=lambda one: int(one.id)
        ) == list(all_problems)


def test_other_settings_or_problems_are_not_mixed_in(file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    one = tmp_path / "one.jsonl"
    one.write_text(file.read_text().splitlines()[0])
    assert invoke("--problems", str(one), FIELDS, "--output", str(folder)).exit_code == 0
    kept = (folder / "solutions.jsonl").read_bytes()
    result = invoke("--problems", str(file), FIELDS, "--output", str(folder), "--threshold", "0.2")
    assert (result.exit_code, "with another setting" in result.stderr) == (1, True)
    rows = [{"question": "Mia has 2 cups. How many cups does Mia have?", "key": "k0"}]
    file.write_text("\n".join(map(json.dumps, rows)))
    result = invoke("--problems", str(file), FIELDS, "--output", str(folder))
    assert (result.exit_code, "another problem 'k0'" in result.stderr) == (1, True)
    assert (folder / "solutions.jsonl").read_bytes() == kept


def test_what_the_pair_was_not_made_for_fails_alone(tmp_path: Path, texts: list[str]) -> None:
    path, folder = tmp_path / "problems.txt", tmp_path / "out"
    path.write_text("\n".join((texts[0], "What is 17*23?", texts[1])))
    result = invoke("--problems", str(path), "--output", str(folder))
    assert result.exit_code == 1
    assert "Problem 2: the built-in pair cannot solve this" in result.stderr
    assert "2 of 3 solved | 1 failed (the same command tries them again)" in result.stderr
    assert sorted(row["id"] for row in rows_of(folder / "solutions.jsonl")) == ["1", "3"]
    result = invoke("--problems", str(path), "--quiet")
    assert [bool(line) for line in result.stdout.splitlines()] == [True, False, True]
    result = invoke("--problems", str(path), "--output", str(folder), "--force")
    assert "3 of 3 solved, 2 of them before" in result.stderr
    path.write_text("What is 17*23?")
    result = invoke("--problems", str(path))
    assert (result.exit_code, "none of these problems" in result.stderr) == (2, True)


def test_without_an_answer_the_exit_code_is_that_of_one_problem(file: Path) -> None:
    result = invoke("--problems", str(file), FIELDS, "--max-tokens", "3")
    assert result.exit_code == 3
    assert "6 without an answer" in result.stderr
    assert len(result.stdout.splitlines()) == 6


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "holds no problem"),
        ("\n \n", "holds no problem"),
        ('{"question": "a", "key": 1}\n{"question": "b", "key": 1}', "line 2"),
        ('{"question": "a"}', "no field 'key'"),
        ('{"question": 3, "key": 1}', "line 1"),
        ('{"question": " ", "key": 1}', "empty problem"),
        ('{"question": "\\ud800", "key": 1}', "no valid Unicode"),
        ("[1]", "no JSON object"),
        ("{", "no JSON"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, content: str, complaint: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    result = invoke("--problems", str(path), FIELDS)
    assert (result.exit_code, complaint in result.stderr) == (1, True), result.stderr
    assert "Traceback" not in result.stderr


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    for content in b"a\0b", b"\xff\xfe":
        path = tmp_path / "p.txt"
        path.write_bytes(content)
        with pytest.raises(SpecguardError, match="line 1"):
            read_problems(path)
    with pytest.raises(SpecguardError, match="a device"):
        read_problems(Path("/dev/zero"))


@pytest.mark.parametrize(
    "options",
    [
        ["PROBLEM"],
        ["--json"],
        ["--jsonl"],
        ["--trace", "x.html"],
        ["--file", "x"],
        ["--quiet", "--output", "o"],
        ["--shard", "0/3"],
        ["--shard", "4/3"],
        ["--shard", "three"],
        ["--shard", "7/7"],
        ["--fields", "question"],
        ["--fields", "problem=question,answer=a"],
        ["--batch-size", "0"],
    ],
)
def test_options_that_do_not_go_together_are_refused(
    file: Path, tmp_path: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    result = invoke("--problems", str(file), FIELDS, *options)
    assert result.exit_code == 2, result.stderr
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "options",
    [
        ["--output", "o"],
        ["--shard", "1/2"],
        ["--batch-size", "2"],
        ["--memory-budget", "9"],
        ["--fields", "problem=q"],
    ],
)
def test_options_of_many_problems_mean_nothing_for_one(options: list[str]) -> None:
    result = invoke("Mia has 24 shells. How many shells does Mia have?", *options)
    assert (result.exit_code, options[0] in result.stderr) == (2, True)


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_moment_loses_and_repeats_nothing(
    tmp_path: Path, texts: list[str]
) -> None:
    path, folder = tmp_path / "problems.txt", tmp_path / "out"
    path.write_text("\n".join(held_out(40)))
    command = [sys.executable, "-m", "specguard", "solve", COST, "--problems", str(path)]
    command += ["--output", str(folder), "--batch-size", "3"]
    file = folder / "solutions.jsonl"
    for wanted in count(5, 9):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            if file.exists() and file.read_bytes().count(b"\n") >= wanted:
                process.kill()
            time.sleep(0.01)
        if process.returncode != -signal.SIGKILL:
            break
    assert process.returncode == 0
    assert sorted(int(row["id"]) for row in rows_of(file)) == list(range(1, 41))
    assert [path.name for path in folder.iterdir()] == ["solutions.jsonl"]


@pytest.mark.slow
def test_ctrl_c_says_what_is_kept(tmp_path: Path) -> None:
    path, folder = tmp_path / "problems.txt", tmp_path / "out"
    path.write_text("\n".join(held_out(40) * 20))  # more than it can solve meanwhile
    command = [sys.executable, "-m", "specguard", "solve", COST, "--problems", str(path)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [*command, "--output", str(folder)],
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
        # A test that was started in the background is deaf to it.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    file = folder / "solutions.jsonl"
    while not (file.exists() and file.read_bytes().count(b"\n") >= 2):
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert len(rows_of(file)) >= 2
    assert "What is solved is kept; the same command goes on from there." in said
    assert [path.name for path in folder.iterdir()] == ["solutions.jsonl"]
