"""What an observer hears while a problem is solved, and what becomes of one that raises."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specguard.backends.local.engine import LocalEngine
from specguard.backends.tokenizer import FolderTokenizer
from specguard.core import (
    Candidate,
    DraftCost,
    PhaseBegan,
    Progress,
    Solution,
    SolveConfig,
    Solver,
    SpecguardError,
    TokensDrawn,
    VerifierConfig,
)
from specguard.core.progress import TextStream
from tests.conftest import TINY
from tests.contract.calls import (
    FLAT,
    OTHER_PREFIX,
    PREFIX,
    assert_same,
    boundary,
    generate_job,
    outcomes,
    run,
)
from tests.engines import LOCAL_ENGINES, WatchedLayer, fresh, load_local, over
from tests.scripted import CharTokenizer, Scripted

GOOD, WRONG, RIGHT, ANSWER = "one fact.\n\n", "wrong.\n\n", "right.\n\n", "So \\boxed{7}.\n\n"
BY_LOG_PROB = VerifierConfig(weights={"log_prob": 1.0}, bounds={"log_prob": (-2.0, 0.0)})


class StopError(Exception):
    """What an observer raises that has heard enough."""


def solver(lump: int = 0, first_choices: int = 0, **settings: Any) -> Solver:
    draft = Scripted("d", [[GOOD] * 2, [WRONG] * 2, [ANSWER] * 2], lump=lump)
    target = Scripted(
        "t", [RIGHT], logprobs={WRONG: -1.9}, first_choices={WRONG: first_choices}, lump=lump
    )
    config = {"num_candidates": 2, "selector": "ngram", "verifier": BY_LOG_PROB, **settings}
    return Solver(draft, target, SolveConfig(**config))


def heard(solve: Callable[..., Solution], **changes: Any) -> tuple[Solution, list[Progress]]:
    events: list[Progress] = []
    return solve("p", on_progress=events.append, **changes), events


def texts_of(events: Sequence[Progress]) -> dict[tuple[int, str, int], str]:
    """The texts of all candidates, put together."""
    texts: dict[tuple[int, str, int], str] = {}
    for event in events:
        if isinstance(event, TokensDrawn):
            assert event.token_ids
            key = event.step, event.author, event.candidate
            texts[key] = texts.get(key, "") + event.text
    return texts


@pytest.mark.parametrize("lump", [0, 1, 4])
def test_phases_and_tokens_are_heard_as_they_come(lump: int) -> None:
    solution, events = heard(solver(lump).solve)
    assert [step.decision for step in solution.steps] == ["accepted", "rewritten", "accepted"]
    phases = [(event.step, event.phase) for event in events if isinstance(event, PhaseBegan)]
    judged = ["propose", "select", "verify"]
    assert phases == [
        (step, phase)
        for step, extra in ((0, []), (1, ["rewrite"]), (2, []))
        for phase in [*judged, *extra]
    ]
    assert texts_of(events) == {
        (0, "draft", 0): GOOD,
        (0, "draft", 1): GOOD,
        (1, "draft", 0): WRONG,
        (1, "draft", 1): WRONG,
        (1, "target", 0): RIGHT,
        (2, "draft", 0): ANSWER,
        (2, "draft", 1): ANSWER,
    }
    # Each between the phase that it belongs to and the next one.
    behind = [
        next(each.phase for each in reversed(events[:place]) if isinstance(each, PhaseBegan))
        for place, event in enumerate(events)
        if isinstance(event, TokensDrawn) and event.author == "target"
    ]
    assert set(behind) == {"rewrite"}
    sizes = {len(event.token_ids) for event in events if isinstance(event, TokensDrawn)}
    assert max(sizes) == (lump or max(map(len, (GOOD, WRONG, RIGHT, ANSWER))))


@pytest.mark.parametrize("lump", [0, 3])
def test_what_a_rewrite_keeps_comes_first(lump: int) -> None:
    verifier = VerifierConfig(weights={"log_prob": 1.0}, bounds={"log_prob": (-2.0, 0.0)})
    solution, events = heard(solver(lump, first_choices=2, verifier=verifier).solve)
    rewritten = solution.steps[1]
    assert rewritten.num_reused == 2
    written = [each for each in events if isinstance(each, TokensDrawn) and each.author == "target"]
    assert written[0].text == WRONG[:2]
    assert "".join(event.text for event in written) == rewritten.text == WRONG[:2] + RIGHT


@pytest.mark.parametrize(
    ("method", "author"), [("target", "target"), ("draft", "draft"), ("sd", "target")]
)
def test_plain_methods_are_heard_too(method: str, author: str, checkpoint: Path) -> None:
    engine = load_local("torch", checkpoint)
    solver = Solver(engine, engine, SolveConfig(method=method, max_tokens=24, max_step_tokens=9))  # type: ignore[arg-type]
    solution, events = heard(solver.solve)
    texts = {(step.index, author, 0): step.text for step in solution.steps}
    assert texts_of(events) == {key: text for key, text in texts.items() if text}
    assert {each.step for each in events} == {step.index for step in solution.steps}


def test_steps_without_a_draft_are_heard_too() -> None:
    draft = Scripted("d", [[WRONG]])
    target = Scripted("t", ["a.\n\n", "b.\n\n", "c.\n\n", ANSWER], logprobs={WRONG: -1.9})
    config = SolveConfig(verifier=BY_LOG_PROB, draft_cost=DraftCost(5.0))
    solution, events = heard(Solver(draft, target, config).solve)
    assert solution.steps[-1].is_fallback
    assert texts_of(events)[len(solution.steps) - 1, "target", 0] == ANSWER


def test_nobody_listens_where_nobody_asked() -> None:
    silent = solver()
    silent.solve("p")
    jobs = [job for engine in (silent.draft, silent.target) for job in engine.generated]  # type: ignore[union-attr]
    assert jobs
    assert {job.on_tokens for job in jobs} == {None}


def test_async_solutions_are_heard_alike() -> None:
    _, expected = heard(solver(3).solve)
    events: dict[str, list[Progress]] = {"p": [], "q": []}

    async def work() -> None:
        both = solver(3)
        await asyncio.gather(
            *(both.solve_async(text, on_progress=events[text].append) for text in events)
        )

    asyncio.run(work())
    assert events == {"p": expected, "q": expected}


PLACES: dict[str, Callable[[Progress], bool]] = {
    "propose": lambda event: isinstance(event, PhaseBegan),
    "verify": lambda event: isinstance(event, PhaseBegan) and event.phase == "verify",
    "draft": lambda event: isinstance(event, TokensDrawn),
    "target": lambda event: isinstance(event, TokensDrawn) and event.author == "target",
}


@pytest.mark.parametrize("lump", [0, 2])
@pytest.mark.parametrize("place", PLACES)
def test_an_observer_that_raises_ends_its_problem(place: str, lump: int) -> None:
    both = solver(lump)

    def stop(event: Progress) -> None:
        if PLACES[place](event):
            raise StopError

    with pytest.raises(StopError):
        both.solve("p", on_progress=stop)
    for engine in both.draft, both.target:
        assert isinstance(engine, Scripted)
        assert engine.held == set()

    async def work() -> list[Any]:
        asked = both.solve_async("p", on_progress=stop), both.solve_async("p")
        return await asyncio.gather(*asked, return_exceptions=True)

    stopped, other = asyncio.run(work())
    assert isinstance(stopped, StopError)
    assert other.answer == "7"


class BytesTokenizer:
    """An id a byte, so that characters are spread over several."""

    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(token_ids).decode("utf-8", errors="replace")


lumps = st.lists(st.integers(1, 5), min_size=1)


@given(st.text(), lumps)
def test_pieces_of_text_make_the_whole(text: str, sizes: list[int]) -> None:
    tokenizer = BytesTokenizer()
    token_ids = list(text.encode())
    stream = TextStream(tokenizer.decode)
    pieces, start = "", 0
    while start < len(token_ids):
        size = sizes[start % len(sizes)]
        pieces += stream.feed(token_ids[start : start + size])
        start += size
        # What is there of the text so far has been given.
        assert pieces == tokenizer.decode(token_ids[:start]).rstrip("\ufffd")
    assert pieces == text.rstrip("\ufffd")


@pytest.mark.parametrize("size", [1, 2, 7])
def test_pieces_are_those_of_a_real_tokenizer(size: int) -> None:
    tokenizer = FolderTokenizer(TINY / "target", False)
    text = "Mia has 2 \u20ac, \U0001f41a and \u5929\u5730.\n\n\\boxed{caf\u00e9 }"
    token_ids = tokenizer.encode(text)
    stream = TextStream(tokenizer.decode)
    pieces = [
        stream.feed(token_ids[start : start + size]) for start in range(0, len(token_ids), size)
    ]
    assert "".join(pieces) == text == tokenizer.decode(token_ids)


class BytesOfAPrompt(CharTokenizer):
    """The same, for a whole problem."""

    decode = BytesTokenizer.decode

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


def test_a_character_that_a_cut_tears_apart_comes_with_the_next_step() -> None:
    class Torn(Scripted):
        def _candidate(self, *_: object) -> Candidate:
            token_ids = list("a\u20acb".encode())
            is_first = len(self.generated) == 1
            token_ids = token_ids[:2] if is_first else token_ids[2:]
            return Candidate(
                tuple(token_ids),
                self.tokenizer.decode(token_ids),
                np.full(len(token_ids), -0.1),
                "length" if is_first else "eos",
            )

    torn = Torn("t", [""], tokenizer=BytesOfAPrompt())
    solution, events = heard(Solver(target=torn, config=SolveConfig(method="target")).solve)
    assert [step.text for step in solution.steps] == ["a", "\u20acb"]
    assert texts_of(events) == {(0, "target", 0): "a", (1, "target", 0): "\u20acb"}


# Engines of this process.


@pytest.fixture(scope="module", params=LOCAL_ENGINES)
def loaded(request: pytest.FixtureRequest, checkpoint: Path) -> LocalEngine:
    return load_local(request.param, checkpoint)


def listened_to(engine: LocalEngine, on_tokens: Any = None, **more: Any) -> Any:
    cut = boundary(engine, 9, "\0")
    return generate_job(
        engine, num_candidates=3, cap=9, sampling=FLAT, boundary=cut, on_tokens=on_tokens, **more
    )


def test_tokens_are_told_as_they_are_read(loaded: LocalEngine) -> None:
    told: list[tuple[int, tuple[int, ...]]] = []
    candidates = run(
        fresh(loaded), listened_to(loaded, lambda index, ids: told.append((index, ids)))
    )
    assert_same(candidates, run(fresh(loaded), listened_to(loaded)))
    for index, candidate in enumerate(candidates):
        own = [ids for number, ids in told if number == index]
        assert sum(own, ()) == candidate.token_ids
        assert len(own) > 1, "not all of them at the end"


def test_a_listener_has_its_turns(loaded: LocalEngine) -> None:
    """A queue between a solution and whoever reads it runs dry while tokens are drawn."""
    engine, seen = fresh(loaded), []

    async def work() -> int:
        queue: asyncio.Queue[int] = asyncio.Queue()

        async def read() -> None:
            while True:
                seen.append(await queue.get())

        reader = asyncio.create_task(read())
        job = listened_to(engine, lambda index, ids: queue.put_nowait(len(ids)))
        await engine.generate(job)
        num_seen = sum(seen)
        reader.cancel()
        return num_seen

    assert asyncio.run(work()) > 3 * 6  # of 3 times 9


def test_who_raises_ends_its_own_job(loaded: LocalEngine) -> None:
    engine = fresh(loaded)
    num_told = 0

    def stop(index: int, token_ids: tuple[int, ...]) -> None:
        nonlocal num_told
        num_told += 1
        if num_told == 5:
            raise StopError

    told: list[int] = []
    jobs = [
        listened_to(engine, stop, key="stopped"),
        listened_to(engine, lambda index, ids: told.extend(ids), prefix=OTHER_PREFIX, key="heard"),
        listened_to(engine, prefix=(*PREFIX, 70), key="silent"),
    ]
    stopped, *others = outcomes(engine, jobs)
    assert isinstance(stopped, StopError)
    assert num_told == 5, "it is not called again"
    for found, job in zip(others, jobs[1:], strict=True):
        assert_same(found, run(fresh(loaded), job))
    # The problem may go on, if somebody wants it to.
    again = listened_to(engine, key="stopped")
    assert_same(run(engine, again), run(fresh(loaded), again))


def test_nothing_is_told_twice_where_a_pass_fails(loaded: LocalEngine) -> None:
    num_passes = 0

    def watch(token_ids: list[int]) -> None:
        nonlocal num_passes
        num_passes += 1
        if num_passes == 6:
            raise SpecguardError("a pass fails")

    engine = over(WatchedLayer(loaded.layer, watch), loaded)
    told: dict[tuple[str, int], tuple[int, ...]] = {}

    def listener(key: str) -> Any:
        def hear(index: int, token_ids: tuple[int, ...]) -> None:
            told[key, index] = told.get((key, index), ()) + token_ids

        return hear

    keys = ["first", "second"]
    found = outcomes(engine, [listened_to(engine, listener(key), key=key) for key in keys])
    expected = run(fresh(loaded), listened_to(loaded))
    for key, candidates in zip(keys, found, strict=True):
        assert_same(candidates, expected)
        for index, candidate in enumerate(candidates):
            assert told[key, index] == candidate.token_ids


def test_a_problem_that_its_observer_ends_leaves_nothing_behind(loaded: LocalEngine) -> None:
    engine = fresh(loaded)
    config = SolveConfig(
        sampling=FLAT, rewrite_sampling=FLAT, max_tokens=40, max_step_tokens=10, draft_cost=None
    )
    solver = Solver(engine, engine, config)

    num_drawn = 0

    def stop(event: Progress) -> None:
        nonlocal num_drawn
        num_drawn += isinstance(event, TokensDrawn)
        if num_drawn == 4:
            assert engine.num_kept > 0
            raise StopError

    with pytest.raises(StopError):
        solver.solve("p", on_progress=stop)
    assert engine.num_kept == 0
    solution, events = heard(solver.solve)
    for step in solution.steps:
        written = texts_of(events).get((step.index, step.author, 0), "")
        assert written == step.text


def test_tokens_are_told_of_those_who_are_observed() -> None:
    draft, target = Scripted("d", ["bad.\n\n", "ok.$"]), Scripted("t", ["good.\n\n"])
    config = SolveConfig(verifier=VerifierConfig(weights={"log_prob": 1.0}, threshold=1.0))
    heard: list[Progress] = []
    solving = Solver(draft, target, config).begin(
        "p", on_progress=heard.append, observed=("target",)
    )

    async def solve() -> None:
        async for _ in solving.steps():
            pass

    asyncio.run(solve())
    tokens = [event for event in heard if isinstance(event, TokensDrawn)]
    assert {event.author for event in tokens} == {"target"}
    assert any(isinstance(event, PhaseBegan) and event.phase == "propose" for event in heard)
    assert all(job.on_tokens is None for job in draft.generated), "nor is it worth a listener"
