"""Many problems at once: the same solutions, errors that stay where they belong, memory bounded."""

from collections.abc import Iterator
from itertools import islice

import pytest

import specguard
from specguard.core import (
    DraftCost,
    Engine,
    Finished,
    Sampling,
    SolveConfig,
    SpecguardError,
    Task,
    UsageError,
    VerifierConfig,
    solve_many,
)
from specguard.models.tiny import problems
from tests.reference import ReferenceModel

# Models whose steps differ from problem to problem, some accepted and some rewritten.
VERIFIER = VerifierConfig(weights={"log_prob": 1.0}, bounds={"log_prob": (-30.0, 0.0)})
VARIED = Sampling(2.5, 1.0)
CONFIG = SolveConfig(
    num_candidates=3,
    sampling=VARIED,
    rewrite_sampling=VARIED,
    verifier=VERIFIER,
    delimiter=" ",
    max_step_tokens=9,
    max_tokens=60,
)
TEXTS = [f"problem {number}" for number in range(7)]


def engine(**settings: object) -> Engine:
    config = {name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__}
    return Engine(ReferenceModel(1), ReferenceModel(2), SolveConfig(**{**config, **settings}))  # type: ignore[arg-type]


def in_order(finished: Iterator[Finished]) -> list[Finished]:
    return sorted(finished, key=lambda one: one.index)


def decisions(solution: object) -> list[tuple[str, str, int]]:
    return [(step.decision, step.text, step.num_drafted) for step in solution.steps]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": "target"},
        {"method": "sd"},
        {"rewrite": "speculate"},
        {"selector": "target"},
        {"num_candidates": 6, "num_first_candidates": 2, "sampling": Sampling(0.25, 0.9)},
        {"draft_cost": DraftCost(0.4)},
    ],
)
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_a_solution_does_not_depend_on_the_batch(
    settings: dict[str, object], batch_size: int
) -> None:
    alone = [engine(**settings).solve(text) for text in TEXTS]
    together = in_order(solve_many(engine(**settings), TEXTS, batch_size=batch_size))
    assert [one.index for one in together] == list(range(len(TEXTS)))
    for one, expected in zip(together, alone, strict=True):
        assert one.solution is not None
        assert decisions(one.solution) == decisions(expected)
        assert one.solution.finish_reason == expected.finish_reason
        assert one.solution.stats.num_verified_tokens == expected.stats.num_verified_tokens


@pytest.mark.parametrize("backend", ["cpu", "mlx"])
def test_the_built_in_pair_solves_side_by_side_what_it_solves_alone(backend: str) -> None:
    if backend == "mlx":
        pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    pair = specguard.load("tiny", backend=backend, num_candidates=4)
    texts = [problem.text for problem in islice(problems.stream(problems.HELD_OUT), 6)]
    alone = [decisions(pair.solve(text, sampling=Sampling(1.0, 1.0))) for text in texts]
    assert {decision for steps in alone for decision, _, _ in steps} >= {"accepted", "rewritten"}
    for batch_size in 2, 5:
        found = in_order(
            solve_many(pair, texts, batch_size=batch_size, sampling=Sampling(1.0, 1.0))
        )
        assert [decisions(one.solution) for one in found] == alone


def test_who_has_its_step_does_not_wait_for_those_who_have_not() -> None:
    # Steps of one problem are long, those of the others short: they end while it is drawn.
    pair = specguard.load("tiny", backend="cpu", method="draft")
    draft = pair.draft
    assert draft is not None
    rows = []
    run = draft._forward.run  # type: ignore[attr-defined]

    def counted(layout: object, tokens: list[list[int]], *rest: object) -> object:
        rows.append(len(tokens))
        return run(layout, tokens, *rest)

    draft._forward.run = counted  # type: ignore[attr-defined]
    texts = [problem.text for problem in islice(problems.stream(problems.HELD_OUT), 8)]
    alone = [pair.solve(text).text for text in texts]
    num_alone = len(rows)
    rows.clear()
    found = in_order(solve_many(pair, texts, batch_size=4))
    assert [one.solution.text for one in found if one.solution] == alone
    # A pass serves three of the four in the mean, though steps differ in length.
    assert len(rows) < num_alone / 3


def test_a_problem_that_wants_something_else_does_not_wait_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("specguard.core.schedule._PATIENCE", 3)
    texts = [f"problem {number}" for number in range(40)]
    odd = Task("another problem", {"sampling": Sampling(1.0, 1.0)})
    found = solve_many(engine(method="draft"), [odd, *texts], batch_size=4)
    assert 0 in [one.index for one in islice(found, 20)]


def test_one_that_cannot_join_is_alone_in_that() -> None:
    pair = engine(method="target")
    target = pair.target
    assert target is not None
    drafting = target.drafting

    def refusing(*arguments: object) -> object:
        made = drafting(*arguments)  # type: ignore[arg-type]
        add = made.add

        def refuse(sequence: object, *rest: object) -> None:
            if sequence.token_ids[9] == ord("3"):  # type: ignore[attr-defined]
                raise SpecguardError("this one does not fit")
            add(sequence, *rest)  # type: ignore[arg-type]

        made.add = refuse
        return made

    target.drafting = refusing  # type: ignore[method-assign,assignment]
    found = in_order(solve_many(pair, TEXTS, batch_size=7))
    assert [str(one.error) for one in found if one.error] == ["this one does not fit"]
    assert [one.solution.text for one in found if one.solution] == [
        engine(method="target").solve(text).text for text in TEXTS if text[8] != "3"
    ]


def test_requests_of_a_batch_go_in_one_call() -> None:
    pair = engine(method="target")
    sizes: list[int] = []
    target = pair.target
    assert target is not None
    propose = target.propose

    def counted(sequences: list[object], *rest: object) -> object:
        sizes.append(len(sequences))
        return propose(sequences, *rest)  # type: ignore[arg-type]

    target.propose = counted  # type: ignore[method-assign,assignment]
    list(solve_many(pair, TEXTS[:4], batch_size=4))
    assert sizes[0] == 4
    assert max(sizes) == 4


def test_an_error_of_one_problem_leaves_the_others_alone() -> None:
    texts = [TEXTS[0], "x" * 600, TEXTS[1], " "]
    found = in_order(solve_many(engine(), texts, batch_size=4))
    assert [one.error is None for one in found] == [True, False, True, False]
    assert "context window" in str(found[1].error)
    assert found[0].solution is not None
    assert found[0].solution.text == engine().solve(TEXTS[0]).text


def test_an_error_in_a_shared_call_is_that_of_one_problem() -> None:
    pair = engine(method="target")
    target = pair.target
    assert target is not None
    propose = target.propose

    def failing(sequences: list[object], *rest: object) -> object:
        if any(sequence.token_ids[9] == ord("3") for sequence in sequences):  # type: ignore[attr-defined]
            raise SpecguardError("this one cannot go on")
        return propose(sequences, *rest)  # type: ignore[arg-type]

    target.propose = failing  # type: ignore[method-assign,assignment]
    found = in_order(solve_many(pair, TEXTS, batch_size=7))
    assert [one.index for one in found if one.error is not None] == [3]
    assert all(one.solution is not None for one in found if one.index != 3)


def test_settings_may_differ_from_problem_to_problem() -> None:
    tasks = [Task(TEXTS[0], {"seed": seed}) for seed in range(3)]
    found = in_order(solve_many(engine(), tasks, batch_size=3))
    texts = [one.solution.text for one in found if one.solution is not None]
    assert texts == [engine(seed=seed).solve(TEXTS[0]).text for seed in range(3)]
    assert len(set(texts)) > 1


def test_problems_are_read_as_room_becomes_free() -> None:
    read = []

    def endless() -> Iterator[str]:
        for number in range(10**6):
            read.append(number)
            yield f"problem {number}"

    found = solve_many(engine(), endless(), batch_size=2)
    first = list(islice(found, 3))
    assert len(first) == 3
    assert len(read) <= 3 + 2
    found.close()  # type: ignore[attr-defined]


def test_leaving_early_closes_every_sequence() -> None:
    pair = engine()
    opened = []
    for model in (pair.draft, pair.target):
        assert model is not None

        def remembered(*arguments: object, start: object = model.start) -> object:
            opened.append(start(*arguments))  # type: ignore[operator]
            return opened[-1]

        model.start = remembered  # type: ignore[method-assign,assignment]
    found = solve_many(pair, TEXTS, batch_size=4, system_prompt="a long system prompt")
    next(found)
    found.close()  # type: ignore[attr-defined]
    assert opened
    assert all(sequence.is_closed for sequence in opened)


def test_a_budget_bounds_how_many_are_open() -> None:
    pair = engine(method="target")
    # A token takes one byte in the reference model; draft and target hold the prompt and 60 more.
    one = 2 * 4 * (len("problem 0") + 2 + 60)
    sizes = []
    target = pair.target
    assert target is not None
    propose = target.propose

    def counted(sequences: list[object], *rest: object) -> object:
        sizes.append(len(sequences))
        return propose(sequences, *rest)  # type: ignore[arg-type]

    target.propose = counted  # type: ignore[method-assign,assignment]
    found = list(solve_many(pair, TEXTS, batch_size=7, memory_budget=2 * one))
    assert len(found) == len(TEXTS)
    assert max(sizes) == 2
    refused = list(solve_many(pair, TEXTS[:1], memory_budget=one - 1))
    assert "budget" in str(refused[0].error)


def test_impossible_batches_and_settings_are_refused() -> None:
    with pytest.raises(UsageError, match="batch_size"):
        solve_many(engine(), TEXTS, batch_size=0)
    with pytest.raises(UsageError, match="seed"):
        solve_many(engine(), TEXTS, seed=-1)


@pytest.mark.parametrize("backend", ["cpu", "mlx"])
def test_a_common_beginning_of_prompts_is_read_once(backend: str) -> None:
    if backend == "mlx":
        pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    pair = specguard.load("tiny", backend=backend, method="target", max_tokens=40)
    target = pair.target
    assert target is not None
    system = "Please solve the problem below step by step and put the answer in a box."
    texts = [problem.text for problem in islice(problems.stream(problems.HELD_OUT), 3)]
    alone = [pair.solve(text, system_prompt=system).text for text in texts]
    read = []
    prefill = target._forward.prefill  # type: ignore[attr-defined]

    def counted(buffer: object, token_ids: object, num_cached: int = 0) -> None:
        read.append(len(token_ids))  # type: ignore[arg-type]
        prefill(buffer, token_ids, num_cached)

    target._forward.prefill = counted  # type: ignore[attr-defined]
    found = in_order(solve_many(pair, texts, batch_size=2, system_prompt=system))
    assert [one.solution.text for one in found if one.solution] == alone
    lengths = [len(target.tokenizer.encode_prompt(t, system, False).token_ids) for t in texts]
    common = target.tokenizer.encode_prompt(texts[0], system, False).problem_span[0]
    assert common > 20
    assert sum(read) == sum(lengths) - len(texts) - (len(texts) - 1) * (common - 1)
