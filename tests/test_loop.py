"""Every branch of the step loop, on scripted engines."""

from collections.abc import Hashable, Sequence

import numpy as np
import pytest

from specguard.core import (
    GREEDY,
    Pair,
    Sampling,
    Solution,
    SolveConfig,
    Solver,
    SpecguardError,
    StepRecord,
    UsageError,
    VerifierConfig,
)
from tests.scripted import CharTokenizer, Script, Scripted

GOOD, ANSWER = "one fact.\n\n", "So \\boxed{7}.\n\n"
WRONG, RIGHT = "wrong.\n\n", "right.\n\n"
BOUNDS = {"log_prob": (-2.0, 0.0)}
LOG_PROB = VerifierConfig(weights={"log_prob": 1.0}, bounds=BOUNDS)
PROMPT = "\x01p\x02"


def run(draft: Scripted, target: Scripted, **settings: object) -> Solution:
    settings = {"num_candidates": 1, "verifier": LOG_PROB, **settings}
    return Solver(draft, target, SolveConfig(**settings)).solve("p")  # type: ignore[arg-type]


def test_an_accepted_step_is_read_by_the_target_and_both_go_on_behind_it() -> None:
    draft, target = Scripted("d", [GOOD, ANSWER]), Scripted("t", [])
    solution = run(draft, target)
    assert solution.text == GOOD + ANSWER
    assert (solution.answer, solution.finish_reason) == ("7", "answer")
    assert [step.author for step in solution.steps] == ["draft", "draft"]
    assert all(step.is_accepted for step in solution.steps)
    assert draft.verbs == ["generate", "generate"]
    assert target.scored_texts == [[GOOD], [ANSWER]]
    assert target.generated == []
    for engine in draft, target:
        assert [engine.prefix_of(job) for job in engine.jobs] == [PROMPT, PROMPT + GOOD]
    stats = solution.stats
    assert (stats.num_target_tokens, stats.step_acceptance_rate) == (0, 1.0)
    assert stats.num_verified_tokens == stats.num_tokens == len(GOOD + ANSWER)


def test_a_rejected_step_is_written_by_the_target_in_its_place() -> None:
    draft = Scripted("d", [WRONG, ANSWER])
    target = Scripted("t", [RIGHT], logprobs={WRONG: -1.9})
    solution = run(draft, target)
    assert solution.text == RIGHT + ANSWER
    first = solution.steps[0]
    assert (first.author, first.decision, first.draft_text) == ("target", "rewritten", WRONG)
    assert first.signals["log_prob"] == -1.9
    assert first.scores["ensemble"] == pytest.approx(0.05)
    assert first.threshold == LOG_PROB.threshold
    assert target.verbs == ["score", "generate", "score"]
    # The rejected step has left no trace in what either model goes on from.
    assert [target.prefix_of(job) for job in target.jobs] == [PROMPT, PROMPT, PROMPT + RIGHT]
    assert [draft.prefix_of(job) for job in draft.jobs] == [PROMPT, PROMPT + RIGHT]
    stats = solution.stats
    assert (stats.num_target_tokens, stats.num_accepted_steps) == (len(RIGHT), 1)
    assert stats.num_verified_tokens == len(WRONG + ANSWER)
    assert stats.token_acceptance_rate == len(ANSWER) / len(RIGHT + ANSWER)


def test_jobs_of_a_problem_share_a_key_that_no_other_problem_or_role_has() -> None:
    engine = Scripted("both", [WRONG, ANSWER], logprobs={WRONG: -1.9})
    solver = Solver(engine, engine, SolveConfig(num_candidates=1, verifier=LOG_PROB))
    solver.solve("p")
    [first, second] = {job.key for job in engine.generated}
    assert {job.key for job in engine.scored} < {first, second}
    solver.solve("p")
    assert len({job.key for job in engine.jobs}) == 4


def test_a_verifying_draft_calls_the_target_only_on_rejection() -> None:
    draft = Scripted("d", [GOOD, WRONG, ANSWER], logprobs={WRONG: -1.9})
    target = Scripted("t", [RIGHT])
    solution = run(
        draft, target, verifier=VerifierConfig("draft", {"log_prob": 1.0}, bounds=BOUNDS)
    )
    assert solution.text == GOOD + RIGHT + ANSWER
    assert draft.scored == []  # it knows its log-probabilities from drawing
    assert [target.prefix_of(job) for job in target.generated] == [PROMPT + GOOD]
    assert target.scored == []
    assert solution.stats.num_verified_tokens == len(GOOD)  # read on the way to the rewrite


def test_a_target_that_is_never_needed_is_never_asked() -> None:
    target = Scripted("t", [])
    run(Scripted("d", [GOOD, ANSWER]), target, verifier=VerifierConfig("draft", {"log_prob": 1.0}))
    assert target.jobs == []


def test_a_draft_may_verify_by_its_attention() -> None:
    draft = Scripted("d", [GOOD, WRONG, ANSWER], source_mass={WRONG: 0.1})
    target = Scripted("t", [RIGHT])
    verifier = VerifierConfig("draft", {"grounding": 1.0}, threshold=0.7)
    solution = run(draft, target, verifier=verifier)
    assert [step.decision for step in solution.steps] == ["accepted", "rewritten", "accepted"]
    assert draft.scored_texts == [[GOOD], [WRONG], [ANSWER]]
    assert all(job.capture is not None for job in draft.scored)
    assert target.scored == []


def test_without_weights_everything_is_accepted_unseen() -> None:
    target = Scripted("t", [], logprobs={WRONG: -99})
    verifier = VerifierConfig(weights={}, threshold=0.0)
    solution = run(Scripted("d", [WRONG, ANSWER]), target, verifier=verifier)
    assert solution.text == WRONG + ANSWER
    assert target.jobs == []


def test_consistency_alone_needs_no_verifying_pass() -> None:
    target = Scripted("t", [RIGHT])
    verifier = VerifierConfig(weights={"consistency": 1.0}, threshold=0.9)
    draft = Scripted("d", [["abc\n\n", "xyz 123 456\n\n", "qqqqqqqq\n\n"], [ANSWER] * 3])
    solution = run(draft, target, verifier=verifier, num_candidates=3, selector="ngram")
    assert [step.decision for step in solution.steps] == ["rewritten", "accepted"]
    assert target.verbs == ["generate"]
    assert not any(job.hidden_states for job in draft.generated)


def test_the_medoid_is_what_is_verified() -> None:
    outlier, common = "zzz 9.\n\n", "aab 1.\n\n"
    draft = Scripted("d", [[outlier, common, common], [ANSWER] * 3])
    target = Scripted("t", [])
    solution = run(draft, target, num_candidates=3, selector="draft", detail=True)
    assert solution.steps[0].selected == 1
    assert target.scored_texts[0] == [common]
    candidates = solution.steps[0].candidates
    assert candidates is not None
    assert [candidate.text for candidate in candidates] == [outlier, common, common]
    assert candidates[0].similarity < candidates[1].similarity
    assert solution.stats.num_drafted_tokens == 3 * (len(common) + len(ANSWER))


def test_sources_problem_marks_problem_and_steps() -> None:
    draft, target = Scripted("d", [GOOD, ANSWER]), Scripted("t", [])
    verifier = VerifierConfig(weights={"grounding": 1.0}, threshold=0.0, num_layers=2, epsilon=0.02)
    config = SolveConfig(verifier=verifier, num_candidates=1, system_prompt="sys")
    Solver(draft, target, config).solve("pq")
    first, second = (job.capture for job in target.scored)
    assert first is not None
    assert second is not None
    # Template, system prompt, problem, template; then the accepted step.
    head = [False] * 4 + [True, True] + [False]
    assert first.is_source.tolist() == head
    assert second.is_source.tolist() == head + [True] * len(GOOD)
    assert (first.num_layers, first.epsilon) == (2, 0.02)


def test_sources_context_marks_everything() -> None:
    target = Scripted("t", [])
    verifier = VerifierConfig(weights={"grounding": 1.0}, threshold=0.0, sources="context")
    run(Scripted("d", [ANSWER]), target, verifier=verifier)
    [job] = target.scored
    assert job.capture is not None
    assert job.capture.is_source.all()


def test_attention_that_weighs_nothing_is_read_for_a_detailed_record_only() -> None:
    for detail in False, True:
        target = Scripted("t", [])
        [step] = run(Scripted("d", [ANSWER]), target, detail=detail).steps
        assert (target.scored[0].capture is not None) == detail
        assert ("grounding" in step.scores) == detail
        assert (step.tokens is not None and step.tokens.grounding is not None) == detail


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
def test_finish_reasons(script: Script, settings: dict[str, int], reason: str) -> None:
    for method, names in ("specguard", ("d", "t")), ("target", ("t",)), ("draft", ("d",)):
        engines = {name: Scripted(name, script) for name in names}
        solver = Solver(engines.get("d"), engines.get("t"))
        solution = solver.solve("p", method=method, num_candidates=1, verifier=LOG_PROB, **settings)
        assert solution.finish_reason == reason, method
        assert solution.stats.num_tokens <= settings.get("max_tokens", 10**6)


@pytest.mark.parametrize("box", ["\\boxed{}", "\\boxed{ \n }"])
def test_an_empty_box_neither_ends_a_solution_nor_is_its_answer(box: str) -> None:
    echo = f"The answer goes into {box}.\n\n"
    solution = run(Scripted("d", [echo, GOOD, ANSWER]), Scripted("t", []))
    assert (solution.answer, solution.finish_reason) == ("7", "answer")
    assert [step.text for step in solution.steps] == [echo, GOOD, ANSWER]
    solution = run(Scripted("d", [echo, "Done.$"]), Scripted("t", []))
    assert (solution.boxed_answer, solution.finish_reason) == (None, "eos")
    solution = run(Scripted("d", [f"It is \\boxed{{7}}, not {box}.\n\n"]), Scripted("t", []))
    assert (solution.answer, solution.finish_reason) == ("7", "answer")


@pytest.mark.parametrize(
    ("steps", "answer"),
    [
        (["It is Paris.$"], "It is Paris."),
        ([GOOD, "The capital\nis Paris.\n\n", "$"], "The capital\nis Paris."),
        ([GOOD, "So \\boxed{}: Paris. $"], "So \\boxed{}: Paris."),
        ([" $"], None),
    ],
)
def test_where_nothing_is_boxed_the_last_text_is_the_answer(
    steps: list[str], answer: str | None
) -> None:
    solution = run(Scripted("d", list(steps)), Scripted("t", []))
    assert solution.finish_reason == "eos"
    assert (solution.answer, solution.boxed_answer) == (answer, None)
    assert solution.answer_source == (answer and "text")


def test_what_was_cut_has_no_answer_but_a_boxed_one() -> None:
    cut = run(Scripted("d", [GOOD, "It is Paris.\n\n"]), Scripted("t", []), max_tokens=20)
    assert (cut.answer, cut.answer_source, cut.finish_reason) == (None, None, "length")
    looping = run(Scripted("d", [GOOD]), Scripted("t", []))
    assert (looping.answer, looping.answer_source, looping.finish_reason) == (
        None,
        None,
        "repetition",
    )
    boxed = run(Scripted("d", [GOOD, ANSWER]), Scripted("t", []))
    assert (boxed.answer, boxed.answer_source) == ("7", "box")


def test_a_step_cut_by_its_cap_goes_on_as_the_next_step() -> None:
    solution = run(Scripted("d", ["abcdefgh", ANSWER]), Scripted("t", []), max_step_tokens=20)
    assert solution.text == "abcdefgh" + ANSWER


def test_a_character_may_be_split_between_steps() -> None:
    class Bytes(CharTokenizer):
        def decode(self, token_ids: Sequence[int]) -> str:
            return bytes(token_ids).decode(errors="replace")

    draft = Scripted("d", ["abcdefg\u00c3", "\u00a9 \\boxed{1}.\n\n"], tokenizer=Bytes())
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
    assert solution.stats.num_prompt_tokens + solution.stats.num_tokens == 20
    assert all(len(job.prefix) + job.boundary.max_tokens <= 20 for job in draft.generated)
    with pytest.raises(SpecguardError, match="22 tokens and the context window holds 20"):
        Solver(draft, Scripted("t", [])).solve("p" * 20)


@pytest.mark.parametrize("method", ["target", "draft"])
def test_plain_decoding_is_greedy_by_default_and_asks_one_engine_only(method: str) -> None:
    engine, other = Scripted("m", [GOOD, ANSWER]), Scripted("other", [])
    role = {"target": "draft", "draft": "target"}[method]
    solver = Solver(**{method: engine, role: other})  # type: ignore[arg-type]
    solution = solver.solve("p", method=method)
    assert engine.verbs == ["generate", "generate"]
    assert {job.sampling for job in engine.generated} == {GREEDY}
    assert [step.decision for step in solution.steps] == ["plain", "plain"]
    assert {step.author for step in solution.steps} == {method}
    assert solution.stats.step_acceptance_rate is None
    assert (solution.stats.num_target_tokens > 0) == (method == "target")
    solver.solve("p", method=method, sampling=Sampling(0.5, 0.9))
    assert engine.generated[-1].sampling == Sampling(0.5, 0.9)
    assert other.jobs == []


def test_rewrites_follow_their_own_sampling() -> None:
    draft, target = Scripted("d", [WRONG, ANSWER]), Scripted("t", [RIGHT], {WRONG: -9})
    run(draft, target, rewrite_sampling=Sampling(0.3, 0.9), num_candidates=2)
    assert draft.generated[0].sampling == Sampling(0.7, 0.8)
    assert target.generated[0].sampling == Sampling(0.3, 0.9)


def test_a_single_candidate_is_the_likeliest() -> None:
    draft = Scripted("d", [GOOD, ANSWER])
    run(draft, Scripted("t", []), num_candidates=1)
    assert draft.generated[0].sampling == GREEDY


def test_every_job_has_randomness_of_its_own() -> None:
    """Uniforms for the engines that follow them, and a seed for those that do not."""
    draft, target = Scripted("d", [WRONG, WRONG, ANSWER]), Scripted("t", [RIGHT], {WRONG: -9})
    run(draft, target, num_candidates=3, num_first_candidates=2, rewrite_sampling=Sampling())
    jobs = draft.generated + target.generated
    assert len({job.seed for job in jobs}) == len(jobs) == 5
    rows = [tuple(row[:8]) for job in jobs for row in job.uniforms]  # type: ignore[union-attr]
    assert len(set(rows)) == len(rows) == 3 * 2 + 2
    again = Scripted("d", [WRONG, WRONG, ANSWER])
    run(again, Scripted("t", [RIGHT], {WRONG: -9}), num_candidates=3, num_first_candidates=2)
    assert [job.seed for job in again.generated] == [job.seed for job in draft.generated]
    run(again, Scripted("t", [RIGHT]), num_candidates=3, num_first_candidates=2, seed=1)
    assert again.generated[-1].seed not in {job.seed for job in jobs}


def test_the_stream_yields_what_the_solution_holds() -> None:
    solver = Solver(Scripted("d", [GOOD, ANSWER]), Scripted("t", []))
    stream = solver.stream("p", num_candidates=1, verifier=LOG_PROB)
    seen: list[StepRecord] = list(stream)
    assert stream.solution is not None
    assert stream.solution.steps == tuple(seen)


def test_phases_are_timed() -> None:
    draft = Scripted("d", [WRONG, ANSWER])
    solution = run(draft, Scripted("t", [RIGHT], {WRONG: -9}))
    assert set(solution.steps[0].seconds) == {"propose", "select", "verify", "rewrite"}
    assert set(solution.steps[1].seconds) == {"propose", "select", "verify"}
    assert sum(solution.stats.phase_seconds.values()) <= solution.stats.seconds


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
    assert target.scored_texts == [[WRONG, other, RIGHT], [ANSWER]]
    assert target.generated == []
    assert last.candidates is not None
    assert {candidate.score for candidate in last.candidates} == {None}
    assert solution.stats.num_verified_tokens == len(WRONG + other + RIGHT + ANSWER)
    assert Solution.from_json(solution.to_json()) == solution


def test_a_step_of_which_no_candidate_passes_is_rewritten() -> None:
    draft = Scripted("d", [[WRONG, GOOD], [ANSWER] * 2])
    target = Scripted("t", [RIGHT], logprobs={WRONG: -1.9, GOOD: -1.5})
    solution = run(draft, target, num_candidates=2, selector="target")
    assert solution.text == RIGHT + ANSWER
    assert solution.steps[0].draft_text == GOOD
    assert target.verbs == ["score", "generate", "score"]


def test_the_target_selects_by_attention_too() -> None:
    verifier = VerifierConfig(weights={"grounding": 1.0}, threshold=0.5)
    draft = Scripted("d", [[WRONG, RIGHT], [ANSWER] * 2])
    target = Scripted("t", [], source_mass={WRONG: 0.1, RIGHT: 0.9})
    solution = run(draft, target, verifier=verifier, num_candidates=2, selector="target")
    assert solution.text == RIGHT + ANSWER


class Judge:
    """A reward model that knows which steps are right."""

    name = "judge"

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.keys: set[Hashable] = set()
        self.released: list[Hashable] = []

    async def rewards(self, key: Hashable, problem: str, steps: Sequence[str]) -> list[float]:
        assert problem == "p"
        self.keys.add(key)
        self.asked.append(list(steps))
        return [0.1 if WRONG in step else 0.9 for step in steps]

    def release(self, key: Hashable) -> None:
        self.released.append(key)


def test_a_reward_model_judges_the_steps_of_rsd() -> None:
    draft, target, judge = Scripted("d", [WRONG, ANSWER]), Scripted("t", [RIGHT]), Judge()
    solution = Solver(draft, target, SolveConfig("rsd", 1), judge).solve("p")
    assert solution.text == RIGHT + ANSWER
    assert [step.scores["reward"] for step in solution.steps] == [0.1, 0.9]
    assert {step.threshold for step in solution.steps} == {0.7}
    assert judge.asked == [[WRONG], [RIGHT, ANSWER]]
    assert target.verbs == ["generate"]
    assert set(judge.released) == judge.keys
    lenient = SolveConfig("rsd", 1, reward_threshold=0.1)
    assert Solver(draft, target, lenient, judge).solve("p").text == WRONG + ANSWER


def test_missing_engines_and_blank_problems_are_refused() -> None:
    engine = Scripted("m", [ANSWER])
    with pytest.raises(UsageError, match="needs a target"):
        Solver(draft=engine).solve("p")
    with pytest.raises(UsageError, match="empty"):
        Solver(engine, engine).solve(" \n")
    with pytest.raises(UsageError, match="no setting is called 'beta'"):
        Solver(engine, engine).solve("p", beta=1)
    with pytest.raises(UsageError, match="needs a reward model"):
        Pair(engine, engine).engines_for(SolveConfig("rsd"))
    assert engine.jobs == []


def test_detail_keeps_the_tokens_of_steps_that_one_model_writes() -> None:
    engine = Scripted("m", [GOOD, ANSWER])
    [first, _] = Solver(target=engine).solve("p", method="target", detail=True).steps
    assert first.tokens is not None
    assert "".join(first.tokens.pieces) == GOOD
    np.testing.assert_allclose(first.tokens.logprobs, -0.1)
    assert first.tokens.grounding is None
