"""The collection of a real pair's steps: its pure parts, without vLLM and without models."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from recipes.real_pair import answers, figures, labels, lines, profile, steps
from recipes.real_pair.signals import grounding_values, to_do, token_values
from specguard.backends.tokenizer import FolderTokenizer
from specguard.core import AttentionBlock, DraftCost, Observation
from specguard.models import tiny

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


def test_consistency_leaves_the_step_itself_out() -> None:
    samples = [{"text": text} for text in ("4 apples", "4 apples", "5 pears", "4 plums")]
    place = {"problem": 1, "step": 0}
    sampled = {**place, "text": "5 pears", "candidate": 2, "multiplicity": 1}
    greedy = {**place, "text": "4 apples", "candidate": None, "multiplicity": 2}
    found = figures.consistency([sampled, greedy], [{**place, "samples": samples}])
    assert found["equal"].tolist() == [0.25, 0.5]
    assert found["numbers"][0] == 0
    assert found["numbers"][1] == pytest.approx(0.75)
    assert found["n-grams"][0] < found["n-grams"][1] < found["numbers"][1]


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


COST = DraftCost(0.5, verification=2.0, reading=0.1)


def test_a_part_ends_with_the_draft_s_confidence() -> None:
    step = figures.Drafted.of(SIGNALS)  # the draft's log-probabilities: -1, -1, -1, -0.5
    assert [step.part(0, 9, least) for least in (0.0, 0.5, 0.2, 0.06, 0.01)] == [4, 1, 2, 3, 4]
    assert (step.part(2, 9, 0.2), step.part(1, 2, 0.01)) == (4, 3)
    assert [step.first_other(start) for start in range(4)] == [2, 2, 2, 3]


def test_guesses_write_up_to_the_target_s_own_choice() -> None:
    step = figures.Drafted.of(SIGNALS)
    # By a pace of 0.8, a guess of this draft ends with its first token: the target keeps it and
    # writes one behind it, then one in the place of each of the two that it would not write.
    assert figures.by_guesses(step, 0, COST, 0.8) == pytest.approx(3 * (0.5 + 2 + 0.1))


def test_the_frontier_counts_what_passes_and_what_it_costs() -> None:
    points = figures.frontier([SIGNALS, wrong()], DraftCost(0.9, verification=0.2))
    by_name = {point.name: point for point in points}
    # A guess has one token: so dear is the draft.
    assert by_name["sd"].time == pytest.approx(3 * 1.1 / 4)
    # Sums are -4.75 and -36. Parts have two tokens; the second step is lost with its first part,
    # and one token is left for the target to write.
    assert by_name["-6"][1:4] == (1.0, 0.0, 0.0)
    assert by_name["-6"].time == pytest.approx((2 * 2.0 + 2.0 + 1.1) / 8)
    assert by_name["-4.5"][1:4] == (0.0, 0.0, 0.0)
    assert by_name["-4.5"].time == pytest.approx((2 * 2.0 + 1.1 + 2.0 + 1.1) / 8)
    assert figures.drawn(points).startswith(b"\x89PNG")


def test_a_verifier_is_fitted_to_signals_as_the_verifier_computes_them(
    tmp_path: Path,
) -> None:
    for name, role in ("coder-0.5b", "draft"), ("coder-1.5b", "target"):
        (tmp_path / name).symlink_to(Path(tiny.__file__).parent / role)
    token_ids = FolderTokenizer(tmp_path / "coder-1.5b").encode("24 / 2, so 12")[:4]
    rows = [
        {
            **(SIGNALS if number % 2 else wrong()),
            "problem": number % 6,
            "step": number,
            "token_ids": token_ids,
        }
        for number in range(60)
    ]
    (tmp_path / "signals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--pair", str(tmp_path), "--output", str(tmp_path), "--ship", str(tmp_path)]
    result = CliRunner().invoke(profile.main, options)
    assert result.exit_code == 0, result.output
    assert result.output.startswith("60 greedy steps of 6 problems, 30 right")
    stored = json.loads((tmp_path / "qwen2.5-coder.json").read_text())
    assert stored["pair"] == stored["name"] == "qwen2.5-coder"
    assert set(stored["verifier"]["bounds"]) == {"log_prob_sum", "log_prob_numbers"}
    assert stored["verifier"]["bounds"]["log_prob_sum"] == [-36.0, -4.75]
    assert stored["figures"]["right_accepted"] == 1.0
    assert stored["figures"]["wrong_accepted"] == 0.0


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
