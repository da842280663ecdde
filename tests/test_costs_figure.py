"""Which figure says what drafting costs: kept, measured, by size; and what becomes of it."""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

import specguard
from specguard.core import (
    DraftCost,
    Pair,
    Solution,
    SolveConfig,
    Solver,
    SpecguardError,
    VerifierConfig,
)
from specguard.core.config import PRESETS, Author
from specguard.core.engine import GREEDY, Sampling
from specguard.core.reference import VARIABLE
from specguard.costs import kept
from specguard.costs.figure import MEASURING, conditions_for, settle_cost
from specguard.costs.kept import cost_path, keep_cost, read_cost
from specguard.costs.probe import Measurement
from tests.conftest import TINY
from tests.scripted import Scripted
from tests.timed import Clock, Timed

LOG_PROB = VerifierConfig(weights={"log_prob": 1.0}, bounds={"log_prob": (-2.0, 0.0)})
CONFIG = SolveConfig(verifier=LOG_PROB)
HERE: dict[str, Any] = {
    "draft": {"name": str(TINY / "draft"), "device": "2 threads"},
    "target": {"name": str(TINY / "target"), "device": "2 threads"},
}
ELSEWHERE = {**HERE, "target": {"name": "some/target", "device": "a GPU"}}
PAYS = {"token": 0.01, "pass_": 0.02}
COST = DraftCost(0.4, 0.0, 2.0, source="measured")


@pytest.fixture(autouse=True)
def measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read what is kept, as outside the tests."""
    monkeypatch.setattr("specguard.costs.figure.read_cost", kept.read_cost)


class Settled:
    """Settings after a figure was looked for, on a pair whose draft takes 0.4 of the target."""

    def __init__(
        self,
        config: SolveConfig = CONFIG,
        conditions: Mapping[str, Any] = HERE,
        target: dict[str, float] = PAYS,
        fail_at: str | None = None,
        stalls: dict[int, float] | None = None,
        **more: Any,
    ) -> None:
        clock = Clock(stalls)
        self.draft = Timed("d", [], clock=clock, token=0.004, pass_=0.006)
        error = SpecguardError("it is gone")
        self.target = Timed("t", [], clock=clock, fail_at=fail_at, error=error, **target)  # type: ignore[arg-type]
        self.heard: list[str] = []
        self.config, self.notes = settle_cost(
            Pair(self.draft, self.target),
            config,
            conditions,
            progress=self.heard.append,
            clock=clock,
            **more,
        )
        self.cost = self.config.draft_cost
        self.is_measured = bool(self.draft.jobs)


def test_what_is_not_known_is_measured_once_and_said() -> None:
    first, second = Settled(), Settled()
    assert first.is_measured
    assert first.cost == second.cost == COST
    assert first.heard == [MEASURING]
    [note] = first.notes
    assert "measured in " in note
    assert "0.40 a token, 2.0 to verify a step" in note
    assert not second.is_measured
    assert second.notes == second.heard == []
    content = json.loads(cost_path(HERE).read_text())
    assert content["conditions"] == HERE
    assert content["measured"].startswith("20")
    assert content["seconds"]["target"] == pytest.approx(0.01)


def test_it_is_measured_anew_where_somebody_asks_for_it() -> None:
    slower = {"token": 0.005, "pass_": 0.02}
    Settled()
    anew = Settled(target=slower, anew=True)
    assert anew.cost == DraftCost(0.8, 0.0, 4.0, source="measured")
    assert Settled(target=PAYS).cost == anew.cost


def test_another_device_has_a_figure_of_its_own() -> None:
    Settled()
    assert Settled(conditions=ELSEWHERE).is_measured
    assert not Settled().is_measured
    assert len(list(cost_path(HERE).parent.iterdir())) == 2
    assert cost_path(ELSEWHERE).name.startswith("draft+target-")


COST_FILE = {"conditions": HERE, "cost": asdict(COST)}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b'"cost"',
        b"{",
        json.dumps({"conditions": HERE}).encode(),
        json.dumps({**COST_FILE, "conditions": ELSEWHERE}).encode(),
        json.dumps({**COST_FILE, "cost": {"candidate": "0.4"}}).encode(),
        json.dumps({**COST_FILE, "cost": {"candidate": -1}}).encode(),
        json.dumps({**COST_FILE, "cost": {"candidates": 1}}).encode(),
        json.dumps({**COST_FILE, "cost": [0.4]}).encode(),
    ],
)
def test_a_file_that_says_nothing_is_replaced(content: bytes) -> None:
    path = cost_path(HERE)
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    settled = Settled()
    assert settled.is_measured
    assert settled.cost == COST
    assert not Settled().is_measured


def test_a_folder_that_cannot_be_written_is_said_and_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPECGUARD_CACHE_DIR", str(tmp_path / "file" / "cache"))
    for _ in range(2):
        settled = Settled()
        assert settled.is_measured
        assert settled.cost == COST
        [note] = settled.notes
        assert "measured anew next time, as " in note
        assert "cannot be written" in note


def test_what_is_measured_on_a_busy_machine_is_not_kept() -> None:
    for _ in range(2):
        settled = Settled(stalls={job: 0.02 * 2**job for job in range(1, 99)})
        assert settled.is_measured
        assert settled.cost is not None
        assert settled.notes[0].endswith("measured anew next time, as the machine is busy")
    assert not cost_path(HERE).exists()


def test_processes_that_keep_a_figure_at_once_leave_one_of_them() -> None:
    costs = [DraftCost(number / 10, source="measured") for number in range(1, 9)]

    def work(cost: DraftCost) -> None:
        for _ in range(30):
            assert keep_cost(HERE, Measurement(cost, {"all": 1.0})) is None
            assert read_cost(HERE) in costs

    with ThreadPoolExecutor(len(costs)) as pool:
        list(pool.map(work, costs))
    assert [path.suffix for path in cost_path(HERE).parent.iterdir()] == [".json"]


def test_without_a_variable_the_folder_is_the_platform_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPECGUARD_CACHE_DIR")
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: f"/cache/{name}")
    assert cost_path(HERE).parent == Path("/cache/specguard/costs")


def test_what_cannot_be_measured_goes_by_the_sizes_and_says_so() -> None:
    settled = Settled(fail_at="score")
    assert settled.cost is not None
    assert settled.cost.source == "sizes"
    assert 0.2 < settled.cost.candidate < 0.3  # 0.5 and 2.0 million parameters
    [note] = settled.notes
    assert note == (
        "what drafting costs could not be measured (it is gone): it is guessed by the models' sizes"
    )
    unknown = Settled(conditions=ELSEWHERE, fail_at="score")
    assert unknown.cost is None
    assert "(it is gone): every step is drafted" in unknown.notes[0]
    assert Settled().is_measured  # nothing of it is kept


# A pass over 30 tokens costs 13 decode steps: 0.4 + 13 / 30 a token, and with a dearer draft 1.03.
DEAR = {"token": 0.00667, "pass_": 0.087}


def test_where_drafting_cannot_pay_the_target_writes_alone_and_that_is_said() -> None:
    settled = Settled(target=DEAR)
    [_, warning] = settled.notes
    assert warning == (
        "drafting cannot pay here: with every step accepted a token takes 1.03 times what the "
        "target alone takes, so the target writes alone; --no-fallback drafts all the same"
    )
    assert Settled(target=DEAR).notes == [warning]
    draft, target = Scripted("d", ["wrong.\n\n"]), Scripted("t", ["So \\boxed{7}.\n\n"])
    solution = Solver(draft, target, settled.config).solve("p")
    assert [(step.author, step.is_fallback) for step in solution.steps] == [("target", True)]
    assert not draft.jobs


@pytest.mark.parametrize("chosen", ["num_candidates", "selector", "verifier", "sampling"])
def test_who_says_how_to_draft_gets_drafts_and_is_told_what_they_cost(chosen: str) -> None:
    settled = Settled(target=DEAR, chosen={chosen, "seed"})
    assert settled.cost is None
    assert settled.notes[1].endswith("what the target alone takes; --method target is faster")
    assert Settled(chosen={chosen}, conditions=ELSEWHERE).cost == COST


def test_candidates_that_the_target_chooses_among_are_for_accuracy() -> None:
    config = replace(CONFIG, num_candidates=4, selector="target")
    settled = Settled(config)
    assert (settled.config, settled.notes, settled.is_measured) == (config, [], False)
    asked = Settled(config, anew=True)
    assert asked.cost is not None
    medoid = replace(CONFIG, num_candidates=4, selector="draft")
    assert Settled(medoid, conditions=ELSEWHERE).cost == COST


def test_a_plain_method_asks_for_no_figure() -> None:
    for method in "target", "draft":
        config = replace(CONFIG, method=method)
        settled = Settled(config)
        assert (settled.config, settled.notes, settled.is_measured) == (config, [], False)


def test_a_recorded_figure_repeats_a_run() -> None:
    solver = specguard.load("tiny", backend="cpu")
    assert solver.config.draft_cost is not None
    assert solver.config.draft_cost.source == "measured"
    # Of a machine on which drafting pays just now and then.
    solver.config = replace(solver.config, draft_cost=DraftCost(0.9, verification=1.0))
    problem = "Mia has 24 shells. Mia finds 9 more shells. Mia sells half. How many has Mia?"
    changes: dict[str, Any] = {"verifier": replace(solver.config.verifier, threshold=1.0)}
    first = Solution.from_json(solver.solve(problem, **changes).to_json())
    cost = first.config.draft_cost
    assert cost is not None
    again = specguard.load("tiny", backend="cpu", draft_cost=cost).solve(problem, **changes)
    assert [step.decision for step in again.steps] == [step.decision for step in first.steps]
    assert again.text == first.text


def conditions(config: SolveConfig = CONFIG, **more: Any) -> Mapping[str, Any]:
    sources: dict[Author, str] = {"draft": str(TINY / "draft"), "target": str(TINY / "target")}
    backends: dict[Author, str] = {"draft": "cpu", "target": "cpu"}
    given: dict[str, Any] = {
        "sources": sources,
        "backends": backends,
        "arguments": {},
        "dtypes": {"draft": "auto", "target": "auto"},
        "reward": None,
    }
    return conditions_for(**{**given, **more}, config=config)


def test_a_figure_holds_for_what_it_depends_on_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usual = conditions()
    assert json.loads(json.dumps(usual)) == usual
    assert usual["draft"]["version"].startswith("torch ")
    swapped: dict[Author, str] = {"draft": str(TINY / "target"), "target": str(TINY / "draft")}
    others = [
        conditions(sources=swapped),
        conditions(dtypes={"draft": "int4", "target": "auto"}),
        conditions(arguments={"target": {"block_size": "32"}}),
        conditions(replace(CONFIG, num_candidates=8)),
        conditions(replace(CONFIG, num_candidates=4, selector="draft", sampling=Sampling())),
        conditions(replace(CONFIG, verifier=VerifierConfig(**PRESETS["paper"]))),
        conditions(replace(CONFIG, selector="draft", verifier=LOG_PROB.asking("draft"))),
        conditions(replace(CONFIG, method="rsd", selector="draft"), reward="a judge"),
    ]
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    others.append(conditions())
    monkeypatch.setenv(VARIABLE, "1")
    others.append(conditions())
    texts = {json.dumps(each, sort_keys=True) for each in (usual, *others)}
    assert len(texts) == 1 + len(others)
    monkeypatch.undo()
    threshold = replace(LOG_PROB, threshold=0.2)
    for same in (
        replace(CONFIG, verifier=threshold, seed=3, max_tokens=9, max_steps=3),
        replace(CONFIG, num_candidates=3, selector="draft", sampling=GREEDY),
    ):
        assert conditions(same) == conditions()


def test_a_model_that_is_not_on_this_disk_goes_by_its_name() -> None:
    sources: dict[Author, str] = {"draft": "http://there/draft", "target": str(TINY / "target")}
    found = conditions(sources=sources)
    assert found["draft"]["name"] == "http://there/draft"
    assert found["draft"]["fingerprint"] is None
    assert found["target"]["fingerprint"]
    assert "/" not in cost_path(found).name


def test_load_measures_once_for_every_way_of_drafting(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[SolveConfig] = []

    async def measure(pair: Pair, config: SolveConfig, clock: Any) -> Measurement:
        asked.append(config)
        return Measurement(COST, {"all": 1.0})

    monkeypatch.setattr("specguard.costs.figure.measure", measure)
    load = specguard.load
    assert load("tiny", backend="cpu").config.draft_cost == COST
    assert load("tiny", backend="cpu").config.draft_cost == COST
    assert len(asked) == 1
    given = DraftCost(0.9)
    assert load("tiny", backend="cpu", draft_cost=given).config.draft_cost == given
    assert load("tiny", backend="cpu", draft_cost=None).config.draft_cost is None
    assert load("tiny", backend="cpu", method="target").config.draft_cost is None
    assert len(asked) == 1
    heard: list[str] = []
    load("tiny", backend="cpu", remeasure=True, progress=heard.append)
    assert heard[2:] == [MEASURING]
    load("tiny", backend="cpu", num_candidates=16, selector="draft")
    assert [config.num_candidates for config in asked] == [1, 1, 16]
    for settings in {"method": "target"}, {"draft_cost": None}:
        with pytest.raises(specguard.UsageError, match="nothing to measure"):
            load("tiny", backend="cpu", remeasure=True, **settings)


@pytest.mark.parametrize("backend", ["cpu", "mlx"])
def test_engines_of_this_machine_are_measured(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specguard.costs.probe._STEADY", float("inf"))  # it may be busy
    if backend == "mlx":
        pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    solver = specguard.load("tiny", backend=backend)
    cost = solver.config.draft_cost
    assert cost is not None
    assert cost.source == "measured"
    assert cost.candidate > 0
    assert "what drafting costs here" in solver.notes[0]
    assert len(list(cost_path(HERE).parent.iterdir())) == 1
    assert "what drafting costs" not in str(specguard.load("tiny", backend=backend).notes)
