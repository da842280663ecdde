"""The benchmark: resumed runs compute nothing twice and count nothing twice; reports add up."""

import csv
import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from specguard.bench.methods import choose_methods, known_methods
from specguard.bench.report import as_csv, as_markdown, summarise
from specguard.bench.runner import vote
from specguard.bench.statistics import accuracy_interval, interval, mcnemar, paired_p, wilson
from specguard.cli.main import main
from specguard.core import SolveConfig, SpecguardError, config
from specguard.journal import Journal, read_lines


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


def test_a_journal_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    path = tmp_path / "run" / "rows.jsonl"
    with Journal(path, {"stream": 1}) as journal:
        journal.append({"problem": 0})
    with path.open("a") as file:
        file.write('{"problem": 1, "text": "half a li')
    with Journal(path, {"stream": 1}) as journal:
        assert journal.rows == [{"problem": 0}]
        journal.append({"problem": 1})
    assert read_lines(path) == [{"stream": 1}, {"problem": 0}, {"problem": 1}]


def test_a_journal_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with Journal(path, {"stream": 1}) as journal:
        with pytest.raises(SpecguardError, match="another run is"):
            Journal(path, {"stream": 1})
        journal.append({"problem": 0})
    with pytest.raises(SpecguardError, match="stream was 1 and is 2"):
        Journal(path, {"stream": 2})
    with Journal(path, {"stream": 1}):
        pass
    path.write_text('{"stream": 1}\n{"a": \n')
    with pytest.raises(SpecguardError, match="line 2"):
        Journal(path, {"stream": 1})
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_journal_without_rows_leaves_nothing_behind(tmp_path: Path) -> None:
    with Journal(tmp_path / "rows.jsonl", {"stream": 1}):
        assert len(list(tmp_path.iterdir())) == 2  # settings, and a lock
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SpecguardError, match="cannot be written"):
        Journal(Path(__file__) / "rows.jsonl", {})


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with Journal(tmp_path / "rows.jsonl", {}) as journal:
        journal.append({"problem": 0})
        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(SpecguardError, match="No space left"):
            journal.append({"problem": 1})
        assert journal.rows == [{"problem": 0}]


def test_a_run_is_resumed_and_extended(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = ("--models", "tiny", "--backend", "cpu", "--output", folder)
    first = run(*options, "--methods", "target,draft", "--limit", 2)
    assert first.exit_code == 0, first.output
    results = folder / "results.jsonl"
    before = results.read_bytes()
    lines = before.splitlines(keepends=True)
    # Killed while it wrote the last row: that one is done again, the others are not.
    results.write_bytes(b"".join(lines[:-1]) + lines[-1][:40])
    again = run(*options, "--methods", "target,draft", "--limit", 2)
    assert again.exit_code == 0
    assert results.read_bytes().startswith(b"".join(lines[:-1]))
    assert len(results.read_bytes().splitlines()) == len(lines) == 5
    more = run(*options, "--methods", "target,draft,specguard@2", "--limit", 3)
    rows = read_lines(results)[1:]
    assert len(rows) == 9
    assert len({(row["method"], row["seed"], row["id"]) for row in rows}) == 9
    assert "| specguard@2 | 3 |" in more.stdout
    assert (folder / "report.md").read_text() == more.stdout
    assert (folder / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (folder / "frontier.svg").read_bytes()
    # Fewer problems are reported on than are there.
    assert "| target | 1 |" in run(*options, "--methods", "target", "--limit", 1).stdout


def test_other_settings_in_one_folder_are_refused(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"q": "1 + 1?", "a": "2"}) + "\n")
    fields = ("--fields", "problem=q,answer=a")
    options = ("--models", "tiny", "--backend", "cpu", "--methods", "draft", "--output", tmp_path)
    assert run(*options, "--data", data, *fields).exit_code == 0
    refused = run(*options, "--limit", 1)
    assert refused.exit_code == 1
    assert "dataset was 'data' and is 'tiny'" in refused.stderr
    data.write_text(json.dumps({"q": "1 + 2?", "a": "3"}) + "\n")
    refused = run(*options, "--data", data, *fields)
    assert refused.exit_code == 1
    assert "the data set has changed" in refused.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "magic"], "no method is called 'magic'"),
        (["--methods", "target@4"], "has no number of candidates"),
        (["--methods", "paper@x"], "is no number"),
        (["--methods", ","], "no method"),
        (["--seeds", "a"], "--seeds"),
        (["--fields", "problem=q,answer=a"], "--fields has no meaning"),
        (["--data", "x.jsonl", "--fields", "problem=q"], "is not understood"),
    ],
)
def test_bad_options_are_refused(options: list[str], message: str, tmp_path: Path) -> None:
    result = run("--models", "tiny", "--backend", "cpu", "--output", tmp_path, *options)
    assert result.exit_code == 2
    assert message in result.stderr


def test_every_method_is_a_setting_that_can_be_run() -> None:
    base = SolveConfig()
    for name, method in known_methods(base).items():
        assert method.name == name
        assert method.config(base).method in get_args(config.Method)
    greedy, sampled = choose_methods(("target", "target-sampled"), base)
    assert not greedy.is_random(base)
    assert sampled.is_random(base)
    [four] = choose_methods(("paper@4",), base)
    assert four.config(base).num_candidates == 4
    [votes] = choose_methods(("majority-draft@3",), base)
    assert votes.num_samples == 3


def test_the_most_frequent_answer_wins() -> None:
    assert vote(["1", "2", "2"]) == "2"
    assert vote(["\\frac{1}{2}", "3", "\\frac{1} {2}", None, None, None]) == "\\frac{1}{2}"
    assert vote(["7", "8"]) == "7"
    assert vote([None]) is None


def row(method: str, problem: str, is_right: bool, **more: Any) -> dict[str, Any]:
    counts = dict.fromkeys(
        [
            "num_drafted_tokens",
            "num_guessed_tokens",
            "num_kept_tokens",
            "num_accepted_tokens",
            "num_accepted_steps",
            "num_verified_steps",
            "num_verified_step_tokens",
            "num_verified_tokens",
            "num_target_tokens",
            "num_steps",
        ],
        0,
    )
    found = {"method": method, "seed": 0, "id": problem, "is_right": is_right, "seconds": 2.0}
    found |= {"phase_seconds": {"propose": 1.0}, "num_prompt_tokens": 10, "num_tokens": 20}
    found["peak_mebibytes"] = 300.0
    return {**found, **counts, **more}


def test_a_report_adds_up() -> None:
    rows = [row("target", str(i), i < 8, num_target_tokens=20) for i in range(10)]
    ours = {"seconds": 1.0, "num_drafted_tokens": 80, "num_verified_tokens": 20}
    ours |= {"num_verified_steps": 4, "num_accepted_steps": 3}
    ours |= {"num_verified_step_tokens": 20, "num_accepted_tokens": 15}
    rows += [row("specguard", str(i), i < 9, **ours) for i in range(10)]
    target, specguard = summarise(rows, (10, 100))
    assert (target.accuracy, target.interval, target.p) == (0.8, wilson(8, 10), None)
    assert specguard.p == mcnemar([i < 9 for i in range(10)], [i < 8 for i in range(10)])
    assert (specguard.relative_seconds, specguard.steps_accepted) == (0.5, 0.75)
    assert specguard.tokens_accepted == 0.75
    assert specguard.phases == pytest.approx({"propose": 1.0})
    # A prompt of 10 and 80 drafted tokens through 10 parameters, 30 through 100; target: 30 of 100.
    assert specguard.relative_flops == pytest.approx((90 * 10 + 30 * 100) / (30 * 100))
    table = list(csv.DictReader(as_csv([target, specguard]).splitlines()))
    assert float(table[1]["relative_seconds"]) == 0.5
    assert as_markdown([target, specguard]).count("\n") == 4


def test_seeds_of_a_problem_are_no_independent_outcomes() -> None:
    once = [(str(i), i < 30) for i in range(60)]
    assert accuracy_interval(once) == wilson(30, 60)
    low, high = accuracy_interval(once * 8)
    assert high - low > 0.8 * (wilson(30, 60)[1] - wilson(30, 60)[0])
    assert paired_p({"a": [True]}, {"b": [True]}) is None
    ours = {str(i): [True, True] for i in range(12)}
    theirs = {str(i): [True, False] for i in range(12)}
    # A few that agree prove little, however often each of them was asked.
    assert accuracy_interval([("a", True), ("a", True), ("b", True), ("b", True)]) == (
        pytest.approx(wilson(2, 2))
    )
    is_right = np.random.default_rng(0).random(480) < 0.5
    apart = [(str(i % 60), bool(right)) for i, right in enumerate(is_right)]
    assert np.ptp(accuracy_interval(apart)) < 0.6 * np.ptp(wilson(30, 60))
    p = paired_p(ours, theirs)
    assert p is not None
    assert p < 0.01
    assert paired_p(ours, ours) == 1.0


def test_an_interval_is_over_clusters() -> None:
    """Ten copies of an observation say no more than one."""
    values = np.random.default_rng(0).normal(size=40)
    once = interval(lambda rows: float(values[rows].mean()), range(40))
    copied, clusters = np.repeat(values, 10), np.repeat(np.arange(40), 10)
    tenfold = interval(lambda rows: float(copied[rows].mean()), clusters.tolist())
    assert tenfold == pytest.approx(once, rel=1e-9)
    apart = interval(lambda rows: float(copied[rows].mean()), range(400))
    assert apart[1] - apart[0] < 0.5 * (once[1] - once[0])


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=40))
def test_mcnemar_looks_at_differing_problems_alone(pairs: list[tuple[bool, bool]]) -> None:
    p = mcnemar([a for a, _ in pairs], [b for _, b in pairs])
    differing = [(a, b) for a, b in pairs if a != b]
    assert p == mcnemar([a for a, _ in differing], [b for _, b in differing])
    assert 0 < p <= 1
