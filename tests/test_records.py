import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from specguard.core import DraftCost, Solution, SolveConfig, Solver, SpecguardError
from specguard.trace import render
from tests.scripted import Scripted

# What `specguard solve --json` printed before rewrites by speculation went, with detail.
VERSION_1 = Path(__file__).parent / "data" / "solution-v1.json"


@pytest.fixture(params=["specguard", "target"])
def solution(request: pytest.FixtureRequest) -> Solution:
    draft = Scripted("d", [["wrong.\n\n", "wrong 2.\n\n"], ["So \\boxed{7}.$"] * 2])
    target = Scripted("t", ["rëch.\n\n", "So \\boxed{7}.$"], {"wrong.\n\n": -99})
    config = SolveConfig(method=request.param, num_candidates=2, detail=True)
    return Solver(draft, target, config).solve("p")


def test_json_goes_both_ways(solution: Solution) -> None:
    assert Solution.from_json(solution.to_json()) == solution
    assert Solution.from_json(solution.to_json(indent=2)) == solution
    elsewhere = replace(solution, is_reproducible=False)
    assert not Solution.from_json(elsewhere.to_json()).is_reproducible


def test_what_an_engine_does_not_say_is_null_in_json() -> None:
    bare = Scripted("t", ["So \\boxed{7}.$"], features=frozenset({"scoring"}))
    solution = Solver(target=bare).solve("p", method="target", detail=True)
    assert json.loads(solution.to_json())["steps"][0]["tokens"]["entropies"] is None
    assert Solution.from_json(solution.to_json()) == solution


def test_older_json_knows_boxed_answers_only(solution: Solution) -> None:
    data = solution.to_dict()
    assert data.pop("answer_source") == "box"
    assert Solution.from_dict(data) == solution
    cut = Solution.from_dict({**data, "answer": None})
    assert (cut.answer, cut.answer_source) == (None, None)


def test_json_has_the_documented_names(solution: Solution) -> None:
    data = json.loads(solution.to_json())
    assert {"answer", "text", "finish_reason", "steps", "stats"} <= data.keys()
    assert data["schema_version"] == 2
    for step in data["steps"]:
        assert {"text", "accepted", "author", "scores"} <= step.keys()
        if data["config"]["method"] == "specguard":
            assert {"log_prob", "grounding", "ensemble"} <= step["scores"].keys()
            assert len(step["tokens"]["logprobs"]) == len(step["tokens"]["token_ids"])


def test_json_of_the_version_before_still_reads() -> None:
    stored = json.loads(VERSION_1.read_text())
    assert stored["schema_version"] == 1
    assert stored["config"].pop("rewrite") == "speculate"  # is no setting any more
    solution = Solution.from_json(VERSION_1.read_text())
    assert (solution.answer, solution.finish_reason) == ("33", "answer")
    assert [step.decision for step in solution.steps] == ["accepted", "rewritten", "accepted"]
    assert [step.num_guessed for step in solution.steps] == [0, 16, 0]
    assert set(solution.steps[0].seconds) == {"propose", "select", "verify", "commit"}
    assert solution.config.draft_cost == DraftCost(0.25)
    assert solution.config.verifier.model == "draft"
    assert solution.is_reproducible
    # Nothing else has changed on the way, and it is stored and shown as a new one from here on.
    stored |= {"schema_version": 2, "is_reproducible": True, "answer_source": "box"}
    stored["config"]["draft_cost"] |= {"reading": 0.0, "source": "given"}
    for step in stored["steps"]:
        step["is_given_up"] = False
    assert json.loads(solution.to_json()) == stored
    assert Solution.from_json(solution.to_json()) == solution
    assert "Mabel" in render(solution)


@pytest.mark.parametrize("config", [None, 5, {"rewrite": "decode", "seed": -1}])
def test_broken_json_of_the_version_before_is_refused(config: Any) -> None:
    stored = {**json.loads(VERSION_1.read_text()), "config": config}
    with pytest.raises(SpecguardError, match="no stored solution"):
        Solution.from_dict(stored)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 3}, "schema version 3 cannot be read"),
        ({"schema_version": None}, "schema version None"),
        ({"schema_version": "2"}, "schema version 2"),
        ({"answer": 5, "steps": "x"}, "no stored solution"),
        ({"stats": {}}, "no stored solution"),
    ],
)
def test_foreign_json_is_refused(
    solution: Solution, change: dict[str, object], message: str
) -> None:
    with pytest.raises(SpecguardError, match=message):
        Solution.from_dict({**solution.to_dict(), **change})


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_text_that_is_no_solution_is_refused(text: str) -> None:
    with pytest.raises(SpecguardError):
        Solution.from_json(text)
