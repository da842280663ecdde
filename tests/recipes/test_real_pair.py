"""The collection of a real pair's steps: its pure parts, without vLLM and without models."""

import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from recipes.real_pair import answers, figures, labels, lines, steps
from recipes.real_pair.signals import grounding_values, to_do, token_values
from specguard.core import AttentionBlock, Observation

PIECES = ["a", "\n", "\n\n", ".\n\n", "<eos>", " b\n\nc"]


def decode(token_ids: Sequence[int]) -> str:
    return "".join(PIECES[token] for token in token_ids)


@pytest.mark.parametrize(
    ("token_ids", "ranges"),
    [
        ([], []),
        ([0, 0], [(0, 2)]),
        ([0, 3, 0, 2], [(0, 2), (2, 4)]),
        ([0, 1, 1, 0, 4], [(0, 3), (3, 5)]),  # a delimiter of two tokens; EOS in the last step
        ([0, 5, 0], [(0, 2), (2, 3)]),  # a token that goes on behind the delimiter
        ([0, 2, 1, 1], [(0, 2), (2, 4)]),  # none spans two steps
    ],
)
def test_steps_end_with_the_token_that_completes_a_delimiter(
    token_ids: list[int], ranges: list[tuple[int, int]]
) -> None:
    assert steps.cut_steps(decode, token_ids) == ranges


@pytest.mark.parametrize(
    ("content", "number"),
    [
        ("18", 18),
        ("\\$1,200.50", 1200.5),
        ("1{,}200", 1200),
        ("-\\frac{3}{4}", -0.75),
        ("\\frac{1}{0}", None),
        ("x = 2 + 3 = 5", 5),
        ("20\\text{ miles}", 20),
        ("3 or 4", None),
        ("none", None),
    ],
)
def test_an_answer_is_one_number(content: str, number: float | None) -> None:
    assert answers.as_number(content) == number


def test_the_last_balanced_answer_counts() -> None:
    text = "\\boxed{3} then \\boxed{\\frac{8}{2}} then \\boxed{5"
    assert answers.grade(text, 4) == ("\\frac{8}{2}", True)
    assert answers.grade(text, 3) == ("\\frac{8}{2}", False)
    assert answers.grade("4", 4) == (None, False)


def test_problems_keep_their_line_numbers_in_a_fixed_order(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    row = '{"question": "q%d", "answer": "so\\n#### 1,00%d"}\n'
    path.write_text("".join(row % (n, n) for n in range(9)))
    problems = answers.load_problems(path)
    order = list(range(9))
    random.Random(0).shuffle(order)
    assert [problem.index for problem in problems] == order
    assert [problem.gold for problem in problems] == [1000 + n for n in order]
    assert [problem.question for problem in problems] == [f"q{n}" for n in order]


def test_a_cut_last_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_bytes('{"text": "×\u2028"}\n{"te'.encode())  # noqa: RUF001
    assert lines.read_lines(path) == [{"text": "×\u2028"}]  # noqa: RUF001
    file = lines.Lines(path)
    file.append({"text": "b"})
    file.close()
    assert [row["text"] for row in lines.read_lines(path)] == ["×\u2028", "b"]  # noqa: RUF001


def test_the_labelled_sample_differs_from_the_greedy_step() -> None:
    samples = [{"token_ids": [n // 6]} for n in range(8)]  # six are the greedy step
    picks = set()
    for problem in range(40):
        place = {
            "problem": problem,
            "step": 0,
            "greedy": {"token_ids": [0]},
            "samples": samples,
        }
        greedy, (kind, index, candidate, is_first_pick) = labels.chosen_candidates(place)
        assert greedy == ("greedy", None, {"token_ids": [0]}, None)
        assert (kind, candidate["token_ids"]) == ("sample", [1])
        picks.add((index, is_first_pick))
    assert picks == {(6, True), (6, False), (7, True), (7, False)}
    place["samples"] = samples[:6]
    assert len(labels.chosen_candidates(place)) == 1


def label(problem: int, kind: str, is_right: bool, multiplicity: int) -> dict[str, Any]:
    return {
        "problem": problem,
        "step": 0,
        "kind": kind,
        "right": is_right,
        "multiplicity": multiplicity,
    }


def test_samples_are_weighed_by_multiplicity() -> None:
    both = [label(1, "sample", False, 2), label(1, "greedy", True, 6)]
    assert figures.share_of_samples(both) == 6 / 8
    alone = [label(2, "greedy", False, 8)]
    assert figures.share_of_samples(both + alone) == 3 / 8
    assert np.isnan(figures.share_of_samples([]))


SIGNALS: dict[str, Any] = {
    "problem": 3,
    "step": 1,
    "kind": "greedy",
    "right": True,
    "same_as_own": False,
    "text": "2+3 = 5",
    "token_ids": [0, 1, 2, 3],
    "target": {
        "lp": [-0.5, -1.5, -0.25, -2.5],
        "h": [1.0, 0.5, 0.25, 2.0],
        "first": [True, True, False, False],
        "rank": [0, 0, 1, 4],
        "margin": [0.0, 0.0, -0.5, -1.0],
    },
    "draft": {"lp": [-1.0, -1.0, -1.0, -0.5], "h": [0.5, 0.5, 0.5, 2.5]},
}


def test_signals_are_reduced_to_numbers() -> None:
    values = figures.reductions(SIGNALS, ["2", " so", " Mia", "+"])
    expected = {
        "target: min": -2.5,
        "target: mean": -1.1875,
        "target: sum": -4.75,
        "target: share of tokens above -1": 0.5,
        "target: number of tokens below -2": -1,
        "target: min over numbers and operators": -2.5,
        "target: sum over numbers and operators": -3.0,
        "target: least margin to the first choice": -1.0,
        "target: sum of margins": -1.5,
        "target: worst rank": -4,
        "target: share of first choices": 0.5,
        "target: log-prob + entropy, min": -1.0,
        "target: entropy, max": -2.0,
        "draft: entropy, sum": -4.0,
        "log ratio": -1.25,
        "log ratio, min": -2.0,
        "length": -4,
    }
    assert {name: values[name] for name in expected} == pytest.approx(expected)
    assert not any("grounding" in name for name in values)
    assert figures.reductions(SIGNALS, ["a"] * 4)["target: min over numbers and operators"] == 0


def wrong() -> dict[str, Any]:
    return {**SIGNALS, "right": False, "target": {**SIGNALS["target"], "lp": [-9.0] * 4}}


def test_the_table_has_a_row_a_signal() -> None:
    rows = [SIGNALS, wrong()]
    lines = figures.table(rows, [figures.reductions(row, ["1"] * 4) for row in rows])
    cells = {line.split(" | ")[0]: line.split(" | ")[1:] for line in lines[2:]}
    assert cells["| target: min"][0] == "1.000"
    assert cells["| target: min"][-1] == "1.00 |"
    assert cells["| draft: min"][0] == "0.500"
    assert cells["| draft: min"][-1] == "0.00 |"


def test_the_frontier_counts_what_passes_and_what_the_target_goes_on_from() -> None:
    lines = figures.frontier([SIGNALS, wrong()], 0.5)
    rows = {line.split(" | ")[0]: line.strip("| ").split(" | ")[1:] for line in lines[2:]}
    # Sums are -4.75 and -36.
    fixed = 0.5 * 8 + 2 * (1 + 0.045 * 4)
    passing = ["1.000", "0.000", "0.000", f"{(fixed + 2) / 8:.3f}"]
    assert rows["| -6"] == passing
    stopped = ["0.000", "0.000", "0.000", f"{(fixed + 4) / 8:.3f}"]
    assert rows["| -4"] == stopped


def test_a_label_is_scored_once() -> None:
    rows = [{"problem": p, "step": s, "token_ids": [t]} for p, s, t in [(2, 0, 1), (1, 1, 1)]]
    assert to_do([*rows, {**rows[0], "token_ids": [5]}], rows[:1]) == [
        rows[1],
        {**rows[0], "token_ids": [5]},
    ]


def test_tokens_have_a_rank_and_a_margin() -> None:
    distributions = np.array([[0.5, 0.3, 0.2], [0.25, 0.5, 0.25], [1.0, 0.0, 0.0]])
    seen = Observation(
        np.log([0.2, 0.5]),
        np.array([False, True]),
        np.array([1.0, 0.123456]),
        distributions=distributions,
    )
    values = token_values((2, 1), seen)
    assert values["rank"] == [2, 0]
    assert values["margin"] == [round(float(np.log(0.2 / 0.5)), 4), 0.0]
    assert values["first"] == [False, True]
    assert values["h"] == [1.0, 0.1235]


def test_grounding_is_over_the_last_layers() -> None:
    low, top = (
        AttentionBlock(np.full(2, mass), np.full(2, 0.25), np.zeros((2, 2))) for mass in (1.0, 0.5)
    )
    values = grounding_values(Observation(np.zeros(2), np.ones(2, bool), blocks=(low, top)), False)
    assert values["min"][:2] == [0.25, 0.5]
    assert values["source"] == [1.0, 0.5]
    assert values["sink"] == [0.25, 0.25]


class Target:
    """Answers requests at once, from a list of texts."""

    def __init__(self, texts: list[str]) -> None:
        self.tokenizer = SimpleNamespace(decode=decode)
        self.texts = texts
        self.seeds: list[int | None] = []

    def submit(
        self, token_ids: list[int], callback: Any, max_tokens: int, *, seed: int | None, **_: Any
    ) -> None:
        self.seeds.append(seed)
        callback({"token_ids": [0], "text": self.texts.pop(0), "finish": "eos", "logprobs": [0.0]})


def position(greedy: dict[str, Any]) -> dict[str, Any]:
    return {
        "problem": 1,
        "step": 0,
        "num_steps": 2,
        "answer_step": 1,
        "prompt_length": 1,
        "prefix_token_ids": [0],
        "own": {"token_ids": [0, 2]},
        "greedy": {"text": "", "logprobs": [], "finish": "delimiter", **greedy},
        "samples": [greedy] * 8,
    }


@pytest.mark.parametrize(
    ("greedy", "texts", "method", "outcomes"),
    [
        ({"token_ids": [0, 2]}, [], "own", [True]),
        ({"token_ids": [4], "finish": "eos", "text": "\\boxed{5}"}, [], "eos", [True]),
        ({"token_ids": [4], "finish": "eos"}, [], "eos", [False]),
        ({"token_ids": [3]}, ["\\boxed{5}"], "continued", [True]),
        ({"token_ids": [3]}, ["", "\\boxed{5}", "\\boxed{6}"], "continued", [False, True, False]),
    ],
)
def test_a_step_is_right_where_the_target_still_reaches_the_answer(
    tmp_path: Path, greedy: dict[str, Any], texts: list[str], method: str, outcomes: list[bool]
) -> None:
    target: Any = Target(texts)
    file, repeats = lines.Lines(tmp_path / "labels"), lines.Lines(tmp_path / "repeats")
    labeller = labels.Labeller(target, {1: 5.0}, file, repeats)
    labeller.submit([position(greedy)])
    labeller.submit([position(greedy)])  # it is there already
    file.close()
    repeats.close()
    (record,) = lines.read_lines(tmp_path / "labels")
    assert (record["method"], record["outcomes"]) == (method, outcomes)
    assert record["right"] is outcomes[0]
    assert record["multiplicity"] == 8
    assert texts == []
    assert [seed is None for seed in target.seeds] == [True, False, False][: len(target.seeds)]
    assert len(set(target.seeds)) == len(target.seeds)


def test_a_label_is_repeated_with_other_seeds(tmp_path: Path) -> None:
    target: Any = Target(["\\boxed{5}", "\\boxed{5}", "", "\\boxed{5}"])
    file, repeats = lines.Lines(tmp_path / "labels"), lines.Lines(tmp_path / "repeats")
    labeller = labels.Labeller(target, {1: 5.0}, file, repeats)
    positions = [position({"token_ids": [3]})]
    labeller.submit(positions)
    for _ in range(2):
        labeller.submit_repeats(positions)
    file.close()
    repeats.close()
    (record,) = lines.read_lines(tmp_path / "repeats")
    assert (record["first_outcomes"], record["outcomes"]) == ([True], [True, False, True])
    assert len(set(target.seeds)) == 4
