import json

import pytest

from specguard.core import Engine, Solution, SolveConfig, SpecguardError
from tests.scripted import Scripted


@pytest.fixture(params=["specguard", "target"])
def solution(request: pytest.FixtureRequest) -> Solution:
    draft = Scripted("d", [["wrong.\n\n", "wrong 2.\n\n"], ["So \\boxed{7}.$"] * 2])
    target = Scripted("t", ["rëch.\n\n", "So \\boxed{7}.$"], {"wrong.\n\n": -99})
    config = SolveConfig(method=request.param, num_candidates=2, detail=True)
    return Engine(draft, target, config).solve("p")


def test_json_goes_both_ways(solution: Solution) -> None:
    assert Solution.from_json(solution.to_json()) == solution
    assert Solution.from_json(solution.to_json(indent=2)) == solution


def test_json_has_the_documented_names(solution: Solution) -> None:
    data = json.loads(solution.to_json())
    assert {"answer", "text", "finish_reason", "steps", "stats", "schema_version"} <= data.keys()
    for step in data["steps"]:
        assert {"text", "accepted", "author", "scores"} <= step.keys()
        if data["config"]["method"] == "specguard":
            assert {"log_prob", "grounding", "ensemble"} <= step["scores"].keys()
            assert len(step["tokens"]["logprobs"]) == len(step["tokens"]["token_ids"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 99}, "schema version 99"),
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
