"""Every branch of the step loop, on scripted models."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from specguard.core import (
    GREEDY,
    Engine,
    Sampling,
    Solution,
    SolveConfig,
    SpecguardError,
    StepRecord,
    UsageError,
    VerifierConfig,
)
from tests.reference import ReferenceModel
from tests.scripted import CharTokenizer, Scripted

GOOD, ANSWER = "one fact.\n\n", "So \\boxed{7}.\n\n"
WRONG, RIGHT = "wrong.\n\n", "right.\n\n"
LOG_PROB = VerifierConfig(weights={"log_prob": 1.0}, bounds={"log_prob": (-2.0, 0.0)})


def run(draft: Scripted, target: Scripted, **settings: object) -> Solution:
    settings = {"num_candidates": 1, "verifier": LOG_PROB, **settings}
    return Engine(draft, target, SolveConfig(**settings)).solve("p")  # type: ignore[arg-type]


def verbs(model: Scripted) -> list[object]:
    return [call[0] for call in model.calls]


def test_an_accepted_step_is_read_once_by_the_target_and_committed_by_the_draft() -> None:
    draft, target = Scripted("d", [GOOD, ANSWER]), Scripted("t", [])
    solution = run(draft, target)
    assert solution.text == GOOD + ANSWER
    assert (solution.answer, solution.finish_reason) == ("7", "answer")
    assert verbs(draft) == ["start", "propose", "commit", "propose", "commit"]
    assert verbs(target) == ["start", "extend", "extend"]
    assert [step.author for step in solution.steps] == ["draft", "draft"]
    assert all(step.is_accepted for step in solution.steps)
    assert draft.sequences[0].token_ids == target.sequences[0].token_ids
    stats = solution.stats
    assert (stats.num_target_tokens, stats.step_acceptance_rate) == (0, 1.0)
    assert stats.num_verified_tokens == stats.num_tokens == len(GOOD + ANSWER)


def test_a_rejected_step_is_taken_back_and_written_by_the_target() -> None:
    draft = Scripted("d", [WRONG, ANSWER])
    target = Scripted("t", [RIGHT], logprobs={WRONG: -1.9})
    solution = run(draft, target)
    assert solution.text == RIGHT + ANSWER
    first = solution.steps[0]
    assert (first.author, first.decision, first.draft_text) == ("target", "rewritten", WRONG)
    assert first.signals["log_prob"] == -1.9
    assert first.scores["ensemble"] == pytest.approx(0.05)
    assert verbs(target) == ["start", "extend", "rewind", "propose", "commit", "extend"]
    # The draft reads the rewritten step in one pass, and only when it is needed again.
    assert verbs(draft) == ["start", "propose", "extend", "propose", "commit"]
    assert target.called("rewind") == [("rewind", 3)]
    assert solution.stats.num_target_tokens == len(RIGHT)
    assert solution.stats.token_acceptance_rate == len(ANSWER) / len(RIGHT + ANSWER)
    assert draft.sequences[0].token_ids == target.sequences[0].token_ids


def test_a_verifying_draft_calls_the_target_only_on_rejection() -> None:
    draft = Scripted("d", [GOOD, WRONG, ANSWER], logprobs={WRONG: -1.9})
    target = Scripted("t", [RIGHT])
    verifier = VerifierConfig("draft", {"log_prob": 1.0}, bounds={"log_prob": (-2.0, 0.0)})
    solution = run(draft, target, verifier=verifier)
    assert solution.text == GOOD + RIGHT + ANSWER
    # It catches up on the accepted step in one pass, then writes; nothing is read after that.
    assert verbs(target) == ["start", "extend", "propose", "commit"]
    assert target.called("extend")[0][1] == GOOD
    assert solution.stats.num_verified_tokens == len(GOOD)


def test_a_target_that_is_never_needed_is_never_started() -> None:
    target = Scripted("t", [])
    verifier = VerifierConfig("draft", {"log_prob": 1.0})
    run(Scripted("d", [GOOD, ANSWER]), target, verifier=verifier)
    assert target.calls == []


def test_a_draft_that_verifies_by_attention_commits_with_that_pass() -> None:
    draft = Scripted("d", [GOOD, WRONG, ANSWER], source_mass={WRONG: 0.1})
    target = Scripted("t", [RIGHT])
    verifier = VerifierConfig("draft", {"grounding": 1.0}, threshold=0.7)
    solution = run(draft, target, verifier=verifier)
    assert [step.decision for step in solution.steps] == ["accepted", "rewritten", "accepted"]
    assert "commit" not in verbs(draft)
    assert draft.called("rewind") == [("rewind", 3 + len(GOOD))]
    assert draft.sequences[0].token_ids[3:] == [ord(c) for c in GOOD + RIGHT + ANSWER]


def test_without_weights_everything_is_accepted_unseen() -> None:
    target = Scripted("t", [], logprobs={WRONG: -99})
    verifier = VerifierConfig(weights={}, threshold=0.0)
    solution = run(Scripted("d", [WRONG, ANSWER]), target, verifier=verifier)
    assert solution.text == WRONG + ANSWER
    assert target.calls == []


def test_consistency_alone_needs_no_verifying_pass() -> None:
    target = Scripted("t", [RIGHT])
    verifier = VerifierConfig(weights={"consistency": 1.0}, threshold=0.9)
    draft = Scripted("d", [["abc\n\n", "xyz 123 456\n\n", "qqqqqqqq\n\n"], [ANSWER] * 3])
    solution = run(draft, target, verifier=verifier, num_candidates=3, selector="ngram")
    assert [step.decision for step in solution.steps] == ["rewritten", "accepted"]
    assert verbs(target) == ["start", "propose", "commit"]


def test_the_medoid_is_what_is_verified() -> None:
    outlier, common = "zzz 9.\n\n", "aab 1.\n\n"
    draft = Scripted("d", [[outlier, common, common], [ANSWER] * 3])
    target = Scripted("t", [])
    solution = run(draft, target, num_candidates=3, detail=True)
    assert solution.steps[0].selected == 1
    assert target.called("extend")[0][1] == common
    candidates = solution.steps[0].candidates
    assert candidates is not None
    assert [candidate.text for candidate in candidates] == [outlier, common, common]
    assert candidates[0].similarity < candidates[1].similarity
    assert solution.stats.num_drafted_tokens == 3 * (len(common) + len(ANSWER))


def test_sources_problem_marks_problem_and_steps() -> None:
    draft, target = Scripted("d", [GOOD, ANSWER]), Scripted("t", [])
    verifier = VerifierConfig(weights={"grounding": 1.0}, threshold=0.0, num_layers=2)
    config = SolveConfig(verifier=verifier, num_candidates=1, system_prompt="sys")
    Engine(draft, target, config).solve("pq")
    first, second = (call[2] for call in target.called("extend"))
    # Template, system prompt, problem, template; then the accepted step.
    head = [False] * 4 + [True, True] + [False]
    assert first.is_source.tolist() == head  # type: ignore[attr-defined]
    assert second.is_source.tolist() == head + [True] * len(GOOD)  # type: ignore[attr-defined]
    assert first.num_layers == 2  # type: ignore[attr-defined]


def test_sources_context_marks_everything() -> None:
    target = Scripted("t", [])
    verifier = VerifierConfig(weights={"grounding": 1.0}, threshold=0.0, sources="context")
    run(Scripted("d", [ANSWER]), target, verifier=verifier)
    assert target.called("extend")[0][2].is_source.all()  # type: ignore[attr-defined]


def test_a_verifying_pass_reads_attention_where_it_can() -> None:
    for refusal in (None, "soft-capped"):
        target = Scripted("t", [], capture_refusal=refusal)
        [step] = run(Scripted("d", [ANSWER]), target, detail=True).steps
        assert (target.called("extend")[0][2] is None) == (refusal is not None)
        assert ("grounding" in step.scores) == (refusal is None)
        assert step.tokens is not None
        assert (step.tokens.grounding is None) == (refusal is not None)


def test_a_model_without_capture_verifies_by_log_prob_alone() -> None:
    target = Scripted("t", [], capture_refusal="soft-capped")
    assert run(Scripted("d", [ANSWER]), target, detail=True).answer == "7"
    verifier = VerifierConfig(weights={"grounding": 0.5, "log_prob": 0.5})
    with pytest.raises(SpecguardError, match="t cannot be captured: soft-capped") as caught:
        run(Scripted("d", [ANSWER]), target, verifier=verifier)
    assert "--beta 1" in caught.value.hint


@pytest.mark.parametrize(
    ("script", "settings", "reason"),
    [
        (["fine.$"], {}, "eos"),
        (["So \\boxed{1}.$"], {}, "answer"),
        (["a.\n\n"], {}, "repetition"),
        (["a.\n\n", "b.\n\n"] * 3, {}, "repetition"),
        ([f"{i}.\n\n" for i in range(9)], {"max_steps": 4}, "length"),
        ([f"{i}.\n\n" for i in range(9)], {"max_tokens": 10}, "length"),
        (["ab" * 40], {"max_step_tokens": 40}, "repetition"),
    ],
)
def test_finish_reasons(
    script: list[list[str] | str], settings: dict[str, int], reason: str
) -> None:
    for method, models in ("specguard", ("d", "t")), ("target", ("t",)), ("draft", ("d",)):
        made = {name: Scripted(name, script) for name in models}
        engine = Engine(made.get("d"), made.get("t"))
        solution = engine.solve("p", method=method, num_candidates=1, verifier=LOG_PROB, **settings)
        assert solution.finish_reason == reason, method
        assert solution.stats.num_tokens <= settings.get("max_tokens", 10**6)


def test_a_step_cut_by_its_cap_goes_on_as_the_next_step() -> None:
    solution = run(Scripted("d", ["abcdefgh", ANSWER]), Scripted("t", []), max_step_tokens=20)
    assert solution.text == "abcdefgh" + ANSWER


def test_a_character_may_be_split_between_steps() -> None:
    class Bytes(CharTokenizer):
        def decode(self, token_ids: Sequence[int]) -> str:
            return bytes(token_ids).decode(errors="replace")

    script: list[list[str] | str] = ["abcdefg\u00c3", "\u00a9 \\boxed{1}.\n\n"]
    draft = Scripted("d", script, tokenizer=Bytes())
    solution = run(draft, Scripted("t", [], tokenizer=Bytes()))
    assert solution.text == "abcdefg\u00e9 \\boxed{1}.\n\n"
    assert [step.text for step in solution.steps] == ["abcdefg", "\u00e9 \\boxed{1}.\n\n"]


def test_an_answer_may_be_split_between_steps() -> None:
    solution = run(Scripted("d", ["\\boxed{1", "2}.\n\n"]), Scripted("t", []))
    assert (solution.answer, solution.finish_reason) == ("12", "answer")


def test_the_context_window_is_a_limit() -> None:
    draft = Scripted("d", [f"{i}.\n\n" for i in range(9)], context_limit=20)
    solution = run(draft, Scripted("t", []))
    assert solution.finish_reason == "length"
    assert len(draft.sequences[0].token_ids) == 20
    with pytest.raises(SpecguardError, match="22 tokens and the context window holds 20"):
        Engine(draft, Scripted("t", [])).solve("p" * 20)


@pytest.mark.parametrize("method", ["target", "draft"])
def test_plain_decoding_is_greedy_by_default_and_asks_one_model_only(method: str) -> None:
    model = Scripted("m", [GOOD, ANSWER])
    engine = Engine(**{method: model})  # type: ignore[arg-type]
    solution = engine.solve("p", method=method)
    assert verbs(model) == ["start", "propose", "commit", "propose", "commit"]
    assert model.called("propose")[0][2] == GREEDY
    assert [step.decision for step in solution.steps] == ["plain", "plain"]
    assert {step.author for step in solution.steps} == {method}
    assert solution.stats.step_acceptance_rate is None
    assert (solution.stats.num_target_tokens > 0) == (method == "target")
    engine.solve("p", method=method, sampling=Sampling(0.5, 0.9))
    assert model.called("propose")[-1][2] == Sampling(0.5, 0.9)


def test_rewrites_follow_their_own_sampling() -> None:
    draft, target = Scripted("d", [WRONG, ANSWER]), Scripted("t", [RIGHT], {WRONG: -9})
    run(draft, target, rewrite_sampling=Sampling(0.3, 0.9), num_candidates=2)
    assert draft.called("propose")[0][2] == Sampling(0.7, 0.8)
    assert target.called("propose")[0][2] == Sampling(0.3, 0.9)


def test_a_single_candidate_is_the_likeliest() -> None:
    draft = Scripted("d", [GOOD, ANSWER])
    run(draft, Scripted("t", []), num_candidates=1)
    assert draft.called("propose")[0][2] == GREEDY


def test_a_closed_stream_closes_its_sequences() -> None:
    draft, target = Scripted("d", [GOOD]), Scripted("t", [])
    with Engine(draft, target, SolveConfig(num_candidates=1, verifier=LOG_PROB)).stream("p") as s:
        assert next(s).text == GOOD
        assert not draft.sequences[0].is_closed
    assert draft.sequences[0].is_closed
    assert target.sequences[0].is_closed
    assert s.solution is None
    with pytest.raises(StopIteration):
        next(s)


@pytest.mark.parametrize("verb", ["propose", "commit", "extend", "rewind"])
def test_an_exception_closes_every_sequence(verb: str) -> None:
    target = Scripted("t", [RIGHT], {WRONG: -9}, fail_at=verb)
    draft = Scripted("d", [WRONG, GOOD, ANSWER])
    with pytest.raises(RuntimeError, match=verb):
        run(draft, target)
    assert all(sequence.is_closed for sequence in draft.sequences + target.sequences)


def test_the_stream_yields_what_the_solution_holds() -> None:
    engine = Engine(Scripted("d", [GOOD, ANSWER]), Scripted("t", []))
    stream = engine.stream("p", num_candidates=1, verifier=LOG_PROB)
    seen: list[StepRecord] = list(stream)
    assert stream.solution is not None
    assert stream.solution.steps == tuple(seen)


def test_missing_models_and_blank_problems_are_refused() -> None:
    model = Scripted("m", [ANSWER])
    with pytest.raises(UsageError, match="needs a target"):
        Engine(draft=model).solve("p")
    with pytest.raises(UsageError, match="empty"):
        Engine(model, model).solve(" \n")
    with pytest.raises(UsageError, match="no selector"):
        Engine(model, model).solve("p", selector="vibes")


def test_models_with_other_tokens_are_refused_by_name() -> None:
    other = Scripted("t", [], tokenizer=CharTokenizer(shift=1))
    with pytest.raises(SpecguardError, match=r"'\\x01' is 1 in the draft and 2 in the target"):
        Engine(Scripted("d", []), other)
    short = CharTokenizer()
    del short.vocabulary["z"]
    with pytest.raises(SpecguardError, match="'z' is 122 in the target and missing in the draft"):
        Engine(Scripted("d", [], tokenizer=short), Scripted("t", []))
    with pytest.raises(SpecguardError, match="'z' is 122 in the draft and missing in the target"):
        Engine(Scripted("d", []), Scripted("t", [], tokenizer=short))


def test_phases_are_timed() -> None:
    draft = Scripted("d", [WRONG, ANSWER])
    solution = run(draft, Scripted("t", [RIGHT], {WRONG: -9}))
    assert set(solution.steps[0].seconds) == {"propose", "select", "verify", "rewrite"}
    assert set(solution.steps[1].seconds) == {"propose", "select", "verify", "commit"}
    assert sum(solution.stats.phase_seconds.values()) <= solution.stats.seconds


def test_uniforms_are_float32_in_range() -> None:
    from specguard.core.randomness import Purpose, uniforms

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
        uniforms(1, 2, Purpose.TARGET, 3, 1, 8),
        uniforms(1, 2, Purpose.DRAFT, 4, 1, 8),
        drawn[1:2, :8],
    ):
        assert not np.isin(other, drawn[0]).any()


def test_the_target_selects_the_candidate_that_it_scores_highest() -> None:
    other = "other.\n\n"
    draft = Scripted("d", [[WRONG, other, RIGHT, WRONG], [ANSWER] * 4])
    target = Scripted("t", [], logprobs={WRONG: -1.9, other: -1.0, RIGHT: -0.2})
    solution = run(draft, target, num_candidates=4, selector="target", detail=True)
    assert solution.text == RIGHT + ANSWER
    first, last = solution.steps
    assert (first.decision, first.selected) == ("accepted", 2)
    assert first.signals["log_prob"] == -0.2
    assert first.candidates is not None
    scores = [candidate.score for candidate in first.candidates]
    assert scores == pytest.approx([0.05, 0.5, 0.9, 0.05])
    # Equal tokens are read once; a single text is verified as any selected step.
    assert target.calls[1] == ("score", [WRONG, other, RIGHT])
    assert verbs(target) == ["start", "score", "commit", "extend"]
    assert last.candidates is not None
    assert {candidate.score for candidate in last.candidates} == {None}
    assert draft.sequences[0].token_ids == target.sequences[0].token_ids
    assert solution.stats.num_verified_tokens == len(WRONG + other + RIGHT + ANSWER)
    assert Solution.from_json(solution.to_json()) == solution


def test_a_step_of_which_no_candidate_passes_is_rewritten() -> None:
    draft = Scripted("d", [[WRONG, GOOD], [ANSWER] * 2])
    target = Scripted("t", [RIGHT], logprobs={WRONG: -1.9, GOOD: -1.5})
    solution = run(draft, target, num_candidates=2, selector="target")
    assert solution.text == RIGHT + ANSWER
    assert solution.steps[0].draft_text == GOOD
    assert verbs(target) == ["start", "score", "propose", "commit", "extend"]
    assert draft.sequences[0].token_ids == target.sequences[0].token_ids


def test_the_target_selects_by_attention_too() -> None:
    verifier = VerifierConfig(weights={"grounding": 1.0}, threshold=0.5)
    draft = Scripted("d", [[WRONG, RIGHT], [ANSWER] * 2])
    target = Scripted("t", [], source_mass={WRONG: 0.1, RIGHT: 0.9})
    solution = run(draft, target, verifier=verifier, num_candidates=2, selector="target")
    assert solution.text == RIGHT + ANSWER


@pytest.mark.parametrize(
    "verifier",
    [
        VerifierConfig(model="draft", weights={"log_prob": 1.0}),
        VerifierConfig(weights={}),
        VerifierConfig(weights={"consistency": 1.0}),
    ],
)
def test_the_target_selects_only_where_it_verifies(verifier: VerifierConfig) -> None:
    with pytest.raises(UsageError, match="target selects"):
        SolveConfig(selector="target", verifier=verifier)


class Forgetful(ReferenceModel):
    """Does not say what it would have written itself."""

    def extend(self, *arguments: Any, **options: Any) -> Any:
        return [replace(seen, num_greedy=0) for seen in super().extend(*arguments, **options)]


@pytest.mark.parametrize("selector", ["draft", "target"])
@pytest.mark.parametrize("rewrite", ["decode", "speculate"])
@pytest.mark.parametrize("num_candidates", [1, 4])
def test_what_the_target_would_have_written_anyway_is_kept(
    selector: str, rewrite: str, num_candidates: int
) -> None:
    """A rewrite begins with it, and is the same rewrite, down to where its step ends."""
    verifier = VerifierConfig(weights={"log_prob": 1.0}, bounds={"log_prob": (-4.0, 0.0)})
    config = SolveConfig(
        num_candidates=num_candidates,
        sampling=Sampling(1.0, 0.9),
        selector=selector,
        rewrite=rewrite,
        verifier=verifier,
        delimiter="&",
        max_step_tokens=7,
        max_tokens=90,
    )
    num_reused = 0
    for number in range(6):
        # Alike enough that the draft often begins as the target would.
        draft, target, forgetful = ReferenceModel(1), ReferenceModel(1), Forgetful(1)
        for model in target, forgetful:
            model.second = ReferenceModel(7).second
        kept, plain = (
            Engine(draft, model, config).solve(f"problem {number}") for model in (target, forgetful)
        )
        assert [(s.text, s.decision) for s in kept.steps] == [
            (s.text, s.decision) for s in plain.steps
        ]
        for step in kept.steps:
            assert 0 <= step.num_reused <= step.num_tokens
            num_reused += step.num_reused
        assert kept.stats.num_target_tokens <= plain.stats.num_target_tokens
    assert num_reused > 0
