"""Token-level speculation: lossless, whole methods and rewrites alike."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
from scipy.stats import chisquare

import specguard
from specguard.core import Engine, Sampling, SolveConfig, VerifierConfig, solve_many
from specguard.models.tiny import problems
from tests.reference import ReferenceModel, warp

NUM_TOKENS = 3
EOS = 0


def exact(model: ReferenceModel, sampling: Sampling) -> dict[tuple[int, ...], float]:
    """Probability of everything that the model can write after the prompt, in NUM_TOKENS tokens."""
    prompt = model.tokenizer.encode_prompt("\x03\x02", None, False).token_ids
    found: dict[tuple[int, ...], float] = {}
    open_texts: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
    while open_texts:
        ids, mass = open_texts.pop()
        for token_id, share in enumerate(warp(model.logits([*prompt, *ids]), sampling)):
            longer, probability = (*ids, token_id), mass * float(share)
            if len(longer) == NUM_TOKENS or token_id == EOS:
                found[longer] = found.get(longer, 0.0) + probability
            elif probability:
                open_texts.append((longer, probability))
    return found


@pytest.mark.parametrize("sampling", [Sampling(1.0, 1.0), Sampling(0.8, 0.7)])
@pytest.mark.parametrize("num_speculated", [1, 2, 5])
def test_what_is_written_has_the_target_s_distribution(
    sampling: Sampling, num_speculated: int
) -> None:
    draft, target = (ReferenceModel(seed, vocab_size=4, num_layers=1) for seed in (2, 1))
    config = SolveConfig(
        method="sd",
        sampling=sampling,
        num_speculated=num_speculated,
        max_tokens=NUM_TOKENS,
        detail=True,
    )
    engine = Engine(draft, target, config)
    num_runs = 3000
    counts: Counter[str] = Counter()
    for seed in range(num_runs):
        counts[engine.solve("\x03\x02", seed=seed).text] += 1
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


@pytest.fixture(scope="module")
def pair() -> Engine:
    return specguard.load("tiny", backend="cpu")


@pytest.mark.parametrize("num_speculated", [1, 4, 9])
def test_greedy_speculation_writes_what_the_target_writes(
    pair: Engine, num_speculated: int
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
def test_greedy_speculation_is_lossless_on_two_hundred_problems(pair: Engine) -> None:
    texts = [problem.text for problem in islice(problems.stream(problems.HELD_OUT), 200)]
    found: dict[str, list[str]] = {}
    for method in "target", "sd":
        solved = sorted(solve_many(pair, texts, method=method), key=lambda one: one.index)
        found[method] = [one.solution.text for one in solved if one.solution is not None]
    assert len(found["sd"]) == len(texts)
    assert found["sd"] == found["target"]


def test_a_rejected_step_is_rewritten_by_speculation(pair: Engine) -> None:
    # A verifying target keeps what it would have written anyway; here it has not read the step.
    strict = VerifierConfig("draft", weights={"log_prob": 1.0}, threshold=1.0)
    for problem in islice(problems.stream(problems.CALIBRATION), 4):
        settings = {"verifier": strict, "selector": "draft", "num_candidates": 2}
        plain = pair.solve(problem.text, **settings)
        fast = pair.solve(problem.text, rewrite="speculate", **settings)
        assert fast.text == plain.text
        assert [step.author for step in fast.steps] == [step.author for step in plain.steps]
        assert fast.stats.num_target_tokens < plain.stats.num_target_tokens


def test_limits_hold_within_a_block(pair: Engine) -> None:
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


def test_a_seed_decides_what_is_sampled(pair: Engine) -> None:
    problem = next(problems.stream(problems.CALIBRATION)).text
    sampling = Sampling(3.0, 1.0)
    texts = {
        pair.solve(problem, method="sd", sampling=sampling, seed=seed, max_tokens=40).text
        for seed in np.repeat(np.arange(4), 2).tolist()
    }
    assert 1 < len(texts) <= 4
