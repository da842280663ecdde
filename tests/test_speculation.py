"""Token-level speculation: its text is distributed as if the target had written it alone."""

import asyncio
from collections import Counter
from itertools import islice, product

import numpy as np
import pytest
from scipy.stats import chisquare

import specguard
from specguard.core import Candidate, Observation, Sampling, SolveConfig, Solver, solve_many
from specguard.core.randomness import Purpose, job_seed, uniforms
from specguard.core.speculation import accept_tokens
from specguard.models.tiny import problems
from tests.bigrams import bigram_engine
from tests.reference import ReferenceEngine

NUM_TOKENS = 3
EOS = 0
# The middle of each cell: no draw falls on a boundary between two tokens.
GRID = (np.arange(100) + 0.5) / 100


def judged(drafted: np.ndarray, target: np.ndarray, guess: tuple[int, ...], finish: str) -> Counter:
    """What `accept_tokens` makes of a guess, over a grid of uniforms, as shares of 1."""
    n = len(guess)
    candidate = Candidate(guess, "", np.zeros(n), finish, distributions=drafted)  # type: ignore[arg-type]
    seen = Observation(np.zeros(n), np.zeros(n, dtype=bool), distributions=target)
    shares: Counter[tuple[int, ...]] = Counter()
    for accepts, follows in product(GRID, repeat=2):
        _, token_ids = accept_tokens(candidate, seen, np.array([accepts] * n + [follows]))
        shares[tuple(token_ids)] += 1 / len(GRID) ** 2  # type: ignore[assignment]
    return shares


@pytest.mark.parametrize(
    ("draft", "target"),
    [
        ([0.5, 0.3, 0.2], [0.2, 0.3, 0.5]),
        ([0.9, 0.1, 0.0], [0.0, 0.4, 0.6]),
        ([1.0, 0.0, 0.0], [0.25, 0.25, 0.5]),
        ([0.2, 0.2, 0.6], [0.2, 0.2, 0.6]),
    ],
)
def test_an_accepted_or_corrected_token_has_the_target_s_distribution(
    draft: list[float], target: list[float]
) -> None:
    following = [0.1, 0.7, 0.2]
    first, behind = np.zeros(3), np.zeros((3, 3))
    for guess, share in enumerate(draft):
        found = judged(np.array([draft]), np.array([target, following]), (guess,), "length")
        for token_ids, mass in found.items():
            first[token_ids[0]] += share * mass
            if len(token_ids) > 1:
                behind[token_ids[0], token_ids[1]] += share * mass
    assert 0.5 * np.abs(first - target).sum() < 0.005
    # What follows an accepted token is the target's own next one.
    for row in behind[behind.sum(1) > 0.01]:
        np.testing.assert_allclose(row / row.sum(), following, atol=0.01)


def test_what_is_accepted_ends_where_the_guess_differs() -> None:
    draft, target = np.eye(3)[[0, 1, 2]], np.eye(3)[[0, 2, 2, 1]]
    guess = Candidate((0, 1, 2), "", np.zeros(3), "length", distributions=draft)
    seen = Observation(np.zeros(3), np.zeros(3, dtype=bool), distributions=target)
    assert accept_tokens(guess, seen, np.full(4, 0.5)) == (1, [0, 2])
    for finish, token_ids in ("length", [0, 1, 2, 1]), ("delimiter", [0, 1, 2]), ("eos", [0, 1, 2]):
        same = Candidate((0, 1, 2), "", np.zeros(3), finish, distributions=draft)  # type: ignore[arg-type]
        agreed = Observation(
            np.zeros(3), np.zeros(3, dtype=bool), distributions=np.eye(3)[[0, 1, 2, 1]]
        )
        # After the last token of a step there is nothing to draw.
        assert accept_tokens(same, agreed, np.full(4, 0.999999)) == (3, token_ids)


def test_a_token_stands_where_distributions_differ_by_rounding_alone() -> None:
    draft = np.array([[0.5, 0.5]])
    guess = Candidate((1,), "", np.zeros(1), "delimiter", distributions=draft)
    shrunk = np.array([*draft * (1 - 1e-9), [1.0, 0.0]])
    seen = Observation(np.zeros(1), np.zeros(1, dtype=bool), distributions=shrunk)
    assert accept_tokens(guess, seen, np.full(2, 1 - 1e-10)) == (1, [1])


def exact(engine: ReferenceEngine, sampling: Sampling) -> dict[tuple[int, ...], float]:
    """Probability of everything that can be written behind the prompt, in NUM_TOKENS tokens."""
    prompt = engine.tokenizer.encode_prompt("\x03\x02", None, False).token_ids
    found: dict[tuple[int, ...], float] = {}
    open_texts: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
    while open_texts:
        ids, mass = open_texts.pop()
        for token_id, share in enumerate(engine.distribution([*prompt, *ids], sampling)):
            longer, probability = (*ids, token_id), mass * float(share)
            if len(longer) == NUM_TOKENS or token_id == EOS:
                found[longer] = found.get(longer, 0.0) + probability
            elif probability:
                open_texts.append((longer, probability))
    return found


@pytest.mark.parametrize("sampling", [Sampling(1.0, 1.0), Sampling(2.0, 0.8)])
@pytest.mark.parametrize("num_speculated", [1, 2, 5])
def test_what_is_written_has_the_target_s_distribution(
    sampling: Sampling, num_speculated: int
) -> None:
    draft, target = (bigram_engine(seed, vocab_size=4) for seed in (2, 1))
    config = SolveConfig(
        method="sd", sampling=sampling, num_speculated=num_speculated, max_tokens=NUM_TOKENS
    )
    solver = Solver(draft, target, config)
    num_runs = 2000

    async def texts() -> list[str]:
        return [(await solver.solve_async("\x03\x02", seed=seed)).text for seed in range(num_runs)]

    counts = Counter(asyncio.run(texts()))
    expected: Counter[str] = Counter()
    for ids, probability in exact(target, sampling).items():
        expected[target.tokenizer.decode(ids)] += probability  # type: ignore[assignment]
    assert set(counts) <= {text for text, mass in expected.items() if mass > 0}
    likely = [text for text, mass in expected.items() if mass * num_runs >= 5]
    assert len(likely) > 3
    rest = num_runs - sum(counts[text] for text in likely)
    wanted = [expected[text] * num_runs for text in likely]
    observed = [counts[text] for text in likely]
    if num_runs - sum(wanted) >= 5:
        observed, wanted = [*observed, rest], [*wanted, num_runs - sum(wanted)]
    else:
        observed[0] += rest
        wanted[0] += num_runs - sum(wanted)
    assert chisquare(observed, wanted).pvalue > 1e-4


def test_purposes_share_no_randomness() -> None:
    """Uniforms that are drawn for one purpose and used for another would bias what is accepted."""
    assert len(set(Purpose)) == len(Purpose.__members__) == 5
    drawn = {purpose: uniforms(0, 7, purpose, 2, 4, 5000).ravel() for purpose in Purpose}
    for purpose, row in drawn.items():
        assert abs(row.mean() - 0.5) < 0.01
        for other in drawn:
            if other != purpose:
                assert abs(np.corrcoef(row, drawn[other])[0, 1]) < 0.03
                assert not np.isin(row[:100], drawn[other]).any()
    assert len({job_seed(0, 7, purpose, 2, 0) for purpose in Purpose}) == len(Purpose)


def test_uniforms_are_keyed_by_all_that_they_are_for() -> None:
    drawn = uniforms(1, 2, Purpose.DRAFT, 3, 4, 1000)
    assert drawn.dtype == np.float32
    assert drawn.min() >= 0
    assert drawn.max() < 1
    # Keys that differ in their last bits only are other keys, however large.
    large = [uniforms(0, 2**63 + i, Purpose.DRAFT, 0, 1, 4).tolist() for i in (1, 2, 700)]
    assert large[0] != large[1] != large[2] != large[0]
    # A candidate's uniforms depend on neither the number of candidates nor the length asked for.
    np.testing.assert_array_equal(uniforms(1, 2, Purpose.DRAFT, 3, 2, 10), drawn[:2, :10])
    for other in (
        uniforms(2, 2, Purpose.DRAFT, 3, 1, 8),
        uniforms(1, 3, Purpose.DRAFT, 3, 1, 8),
        uniforms(1, 2, Purpose.REWRITE, 3, 1, 8),
        uniforms(1, 2, Purpose.DRAFT, 4, 1, 8),
        drawn[1:2, :8],
    ):
        assert not np.isin(other, drawn[0]).any()


@pytest.fixture(scope="module")
def pair() -> Solver:
    return specguard.load("tiny", backend="cpu")


@pytest.mark.parametrize("num_speculated", [1, 4, 9])
def test_greedy_speculation_writes_what_the_target_writes(
    pair: Solver, num_speculated: int
) -> None:
    for problem in islice(problems.stream(problems.CALIBRATION), 6):
        alone = pair.solve(problem.text, method="target")
        found = pair.solve(problem.text, method="sd", num_speculated=num_speculated)
        assert (found.text, found.finish_reason) == (alone.text, alone.finish_reason)
        assert [step.text for step in found.steps] == [step.text for step in alone.steps]
        stats = found.stats
        assert 0 < stats.num_kept_tokens <= stats.num_guessed_tokens
        assert stats.num_target_tokens == stats.num_tokens - stats.num_kept_tokens
        assert stats.num_verified_tokens >= stats.num_guessed_tokens


@pytest.mark.slow
def test_greedy_speculation_is_lossless_on_two_hundred_problems(pair: Solver) -> None:
    texts = [problem.text for problem in islice(problems.stream(problems.HELD_OUT), 200)]
    found: dict[str, list[str]] = {}
    for method in "target", "sd":
        outcomes = sorted(solve_many(pair, texts, method=method), key=lambda one: one.index)
        found[method] = [one.solution.text for one in outcomes if one.solution is not None]
    assert len(found["sd"]) == len(texts)
    assert found["sd"] == found["target"]


def test_limits_hold_within_a_block(pair: Solver) -> None:
    problem = next(problems.stream(problems.CALIBRATION)).text
    whole = pair.solve(problem, method="target")
    for max_tokens in 1, 2, 7:
        found = pair.solve(problem, method="sd", max_tokens=max_tokens, num_speculated=5)
        assert found.stats.num_tokens == max_tokens
        assert found.finish_reason == "length"
        assert whole.text.startswith(found.text)
    for delimiter in ".", " ", "\n":
        found, alone = (
            pair.solve(problem, method=method, delimiter=delimiter) for method in ("sd", "target")
        )
        assert [step.text for step in found.steps] == [step.text for step in alone.steps]


def test_a_seed_decides_what_is_sampled(pair: Solver) -> None:
    problem = next(problems.stream(problems.CALIBRATION)).text
    sampling = Sampling(3.0, 1.0)
    texts = {
        pair.solve(problem, method="sd", sampling=sampling, seed=seed, max_tokens=40).text
        for seed in np.repeat(np.arange(4), 2).tolist()
    }
    assert 1 < len(texts) <= 4
