"""Token-level speculation, and whole solutions."""

import numpy as np
import pytest

from specguard.core import GREEDY, Engine, Sampling, SolveConfig, VerifierConfig
from specguard.core.randomness import Purpose, uniforms
from tests.contract.calls import OTHER_PROMPT, PROMPT, SAMPLING, TOLERANCE, Model, draws, propose


def test_a_model_accepts_all_of_its_own_tokens(model: Model) -> None:
    sampling = Sampling(1.0, 0.9)
    own, judge = model.start(PROMPT), model.start(PROMPT)
    [candidate] = propose(model, own, 1, 6, sampling, keep_distributions=True)
    row = uniforms(0, 0, Purpose.ACCEPT, 0, 1, 7) * np.float32(0.99)
    [outcome] = model.accept([judge], [candidate], sampling, row)
    assert outcome.num_accepted == len(candidate.token_ids)
    assert outcome.token_ids[: outcome.num_accepted] == candidate.token_ids
    # A bonus token follows only a candidate that was cut by its cap.
    has_bonus = len(outcome.token_ids) > outcome.num_accepted
    assert has_bonus == (candidate.finish == "length")
    assert tuple(judge.token_ids) == PROMPT.token_ids + outcome.token_ids


def test_greedy_speculation_writes_the_greedy_text(model: Model, draft: Model) -> None:
    [expected] = propose(model, model.start(PROMPT), 1, 12, GREEDY)
    judge, guesser = model.start(PROMPT), draft.start(PROMPT)
    written: list[int] = []
    while len(written) < len(expected.token_ids):
        [guess] = propose(draft, guesser, 1, 3, GREEDY, keep_distributions=True)
        [outcome] = model.accept([judge], [guess], GREEDY, draws(1, 4)[0])
        written += outcome.token_ids
        seen = model.start(PROMPT)
        [observation] = model.extend([seen], [written])
        n = len(outcome.token_ids)
        np.testing.assert_allclose(
            outcome.token_logprobs, observation.token_logprobs[-n:], atol=TOLERANCE
        )
        draft.extend([guesser], [outcome.token_ids])
    assert tuple(written[: len(expected.token_ids)]) == expected.token_ids


def test_speculation_in_a_batch_is_speculation_alone(model: Model, draft: Model) -> None:
    sampling = Sampling(1.2, 0.9)
    prompts = [PROMPT, OTHER_PROMPT]
    rows = np.concatenate([uniforms(s, 0, Purpose.ACCEPT, 0, 1, 5) for s in range(2)])
    guesses = [
        propose(draft, draft.start(prompt), 1, 4, sampling, seed=i, keep_distributions=True)[0]
        for i, prompt in enumerate(prompts)
    ]
    together = model.accept([model.start(prompt) for prompt in prompts], guesses, sampling, rows)
    for i, (prompt, guess) in enumerate(zip(prompts, guesses, strict=True)):
        [alone] = model.accept([model.start(prompt)], [guess], sampling, rows[i : i + 1])
        assert alone.token_ids == together[i].token_ids


def test_candidates_without_distributions_cannot_be_judged(model: Model) -> None:
    candidate = propose(model, model.start(PROMPT), 1, 3)[0]
    with pytest.raises(ValueError, match="keep_distributions"):
        model.accept([model.start(PROMPT)], [candidate], SAMPLING, draws(1, 4)[0])


@pytest.mark.parametrize("verifier", ["draft", "target"])
@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_a_target_as_its_own_draft_writes_what_it_writes_alone(
    model: Model, verifier: str, threshold: float
) -> None:
    problem = "Mia has 24 shells."
    settings = {"max_tokens": 60, "max_step_tokens": 9, "max_steps": 12}
    engine = Engine(model, model, SolveConfig(**settings))  # type: ignore[arg-type]
    plain = engine.solve(problem, method="target", detail=True)
    config = VerifierConfig(model=verifier, threshold=threshold)  # type: ignore[arg-type]
    ours = engine.solve(problem, num_candidates=3, sampling=GREEDY, verifier=config, detail=True)
    assert ours.text == plain.text
    assert ours.finish_reason == plain.finish_reason
    expected = "accepted" if threshold == 0.0 else "rewritten"
    assert {step.decision for step in ours.steps} == {expected}
    assert ours.stats.num_tokens == plain.stats.num_tokens


def test_a_seed_decides_the_solution(model: Model) -> None:
    config = SolveConfig(
        num_candidates=4,
        max_tokens=40,
        max_step_tokens=10,
        verifier=VerifierConfig(threshold=0.0),
    )
    engine = Engine(model, model, config)
    texts = [engine.solve("Some problem.", seed=seed).text for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
