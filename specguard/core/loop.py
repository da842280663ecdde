"""The step loop: propose, select, verify, then accept or rewrite; one record per step.

Knows the seam (`specguard.core.model`) and nothing of the models behind it, nor of other problems:
what it wants of a model it yields as a request. Plain decoding by the target or the draft alone
runs through the same loop and statistics.
"""

from collections.abc import Generator
from dataclasses import replace
from typing import Any

from specguard.core.config import TARGET_SELECTOR, Author, SolveConfig
from specguard.core.errors import SpecguardError, UsageError
from specguard.core.fallback import Fallback
from specguard.core.ledger import Drafted, Ledger
from specguard.core.model import Capture, LanguageModel, Observation, Sampling
from specguard.core.randomness import problem_key
from specguard.core.records import Decision, Solution, StepRecord
from specguard.core.requests import Request, Work, perform
from specguard.core.reward import RewardModel, RewardSequence
from specguard.core.selector import Embedder, Selection, best_verdict, distinct, select_medoid
from specguard.core.shortcuts import uses
from specguard.core.verifier import Verdict, by_reward, verify
from specguard.core.writing import Writer, Written


def solve_steps(
    problem: str,
    draft: LanguageModel[Any] | None,
    target: LanguageModel[Any] | None,
    embed: Embedder,
    config: SolveConfig,
    reward: RewardModel | None = None,
) -> Generator[StepRecord, None, Solution]:
    """Yield the steps of a solution as they are decided and return the solution.

    A method needs its own models only. Closing the generator closes every sequence.

    Raises:
        UsageError: a blank problem, or a model that the method needs is missing.
        SpecguardError: the problem does not fit the context window, or attention is weighed and
            the verifying model cannot be captured.
    """
    solving = solve_by_requests(problem, draft, target, embed, config, reward)
    try:
        result = None
        while True:
            event = solving.send(result)
            if isinstance(event, StepRecord):
                yield event
                result = None
            else:
                [result] = perform([event])
    except StopIteration as stop:
        solution: Solution = stop.value
        return solution
    finally:
        solving.close()


def solve_by_requests(
    problem: str,
    draft: LanguageModel[Any] | None,
    target: LanguageModel[Any] | None,
    embed: Embedder,
    config: SolveConfig,
    reward: RewardModel | None = None,
) -> Generator[Request | StepRecord, Any, Solution]:
    """`solve_steps`, but for the calls of the models: who sends their results may share them."""
    run = _Run(problem, draft, target, embed, config, reward)
    try:
        while run.ledger.finish_reason is None:
            if run.is_alone:
                yield (yield from run.write_alone())
                continue
            yield from run.propose()
            yield from run.select()
            yield from run.verify()
            if run.is_accepted:
                yield run.accept()
            else:
                yield (yield from run.rewrite())
        return run.ledger.solution()
    finally:
        run.close()


class _Run:
    """One problem's state: what is written, the step in hand, the books."""

    def __init__(
        self,
        problem: str,
        draft: LanguageModel[Any] | None,
        target: LanguageModel[Any] | None,
        embed: Embedder,
        config: SolveConfig,
        reward: RewardModel | None,
    ) -> None:
        self.config = config
        self.embed = embed
        models = _models_in_use(draft, target, config)
        if not problem.strip():
            raise UsageError("the problem is empty", "give it as an argument, with --file or on -")
        lead = models.get("target") or models["draft"]
        prompt = lead.tokenizer.encode_prompt(problem, config.system_prompt, config.thinking)
        self.writer = Writer(models, prompt, problem_key(problem), config)
        if len(prompt.token_ids) >= self.writer.context_limit:
            raise SpecguardError(
                f"the problem takes {len(prompt.token_ids)} tokens and the context window "
                f"holds {self.writer.context_limit}",
                "shorten the problem or choose a pair with a longer context",
            )
        self.ledger = Ledger(problem, self.writer, config)
        self.fallback = Fallback(config.draft_cost)
        self.judge = _judge(problem, reward, config)
        self.drafted = Drafted([])

    @property
    def is_alone(self) -> bool:
        """Whether one model writes the next step and nothing judges it."""
        return not self.config.is_stepwise or self.fallback.is_on

    @property
    def is_accepted(self) -> bool:
        """Whether the selected candidate passed."""
        assert self.drafted.verdict is not None
        return self.drafted.verdict.is_accepted

    # The phases of a step, in the order of the loop.

    def propose(self) -> Work[None]:
        """The draft's candidates for the next step: a few first, if so wished, then the others."""
        config = self.config
        k, sampling = config.num_candidates, config.step_sampling
        first = config.num_first_candidates or k
        few = self.writer.propose("draft", first, sampling)
        candidates = yield from self.ledger.timed("propose", few)
        num_spared = k - first
        if num_spared and len(distinct(candidates)) > 1:
            more = self.writer.propose_more(candidates, k, sampling)
            candidates = yield from self.ledger.timed("propose", more)
            num_spared = 0
        self.drafted = Drafted(candidates, num_spared)

    def select(self) -> Work[None]:
        """The most consistent candidate, or the one that the target scores highest."""
        candidates = self.drafted.candidates
        with self.ledger.phase("select"):
            selection = self.drafted.selection = select_medoid(candidates, self.embed)
            alternatives = distinct(candidates)
        asks_target = self.config.selector == TARGET_SELECTOR and self.config.method == "specguard"
        if asks_target and len(alternatives) > 1:
            yield from self.ledger.timed("verify", self._score(alternatives, selection))

    def _score(self, alternatives: list[int], selection: Selection) -> Work[None]:
        drafted, verifier = self.drafted, self.config.verifier
        capture = self.writer.capture(verifier)
        candidates = [drafted.candidates[index] for index in alternatives]
        observations = yield from self.writer.score(candidates, capture)
        for index, observation in zip(alternatives, observations, strict=True):
            drafted.scored[index] = verify(
                observation, capture, selection.similarities[index], verifier
            )
        drafted.seen = list(zip(candidates, observations, strict=True))
        best = best_verdict(drafted.scored)
        drafted.observation = observations[alternatives.index(best)]
        drafted.selection = replace(selection, index=best)

    def verify(self) -> Work[None]:
        """Judge the selected candidate; a verifying pass is also its KV in that model."""
        drafted = self.drafted
        assert drafted.selection is not None
        drafted.verdict = drafted.scored.get(drafted.selection.index)
        if drafted.verdict is None:
            drafted.verdict = yield from self.ledger.timed("verify", self._verify())

    def _verify(self) -> Work[Verdict]:
        drafted, verifier = self.drafted, self.config.verifier
        selected = drafted.selected
        if self.judge is not None:
            texts = [step.text for step in self.ledger.steps]
            rewards = self.judge.rewards([*texts, selected.text])
            return by_reward(rewards[-1], self.config.reward_threshold)
        capture: Capture | None = None
        if verifier.needs_attention or (verifier.needs_model and verifier.model == "target"):
            capture = self.writer.capture(verifier)
            read = self.writer.read(verifier.model, selected.token_ids, capture)
            drafted.observation = yield from read
            if verifier.model == "target":
                drafted.seen = [(selected, drafted.observation)]
        observation = drafted.observation or Observation(
            selected.token_logprobs, selected.token_entropies
        )
        return verify(observation, capture, drafted.similarity, verifier)

    def accept(self) -> StepRecord:
        """Keep the draft's step: its KV is committed, unless verifying it already did so."""
        drafted, selected = self.drafted, self.drafted.selected
        with self.ledger.phase("commit"):
            if drafted.observation is None or self.config.verifier.model != "draft":
                self.writer.commit("draft", selected)
            if drafted.scored:
                assert drafted.observation is not None
                handle = drafted.observation.handle
                self.writer.commit("target", replace(selected, handle=handle))
            self.writer.append(selected.token_ids)
        return self._judged("draft", Written(selected))

    def rewrite(self) -> Work[StepRecord]:
        """Take the rejected step back and have the target write it."""
        written = yield from self.ledger.timed("rewrite", self._rewrite())
        return self._judged("target", written)

    def _rewrite(self) -> Work[Written]:
        sampling = self.config.rewrite_sampling
        begun = self._keep_beginning()
        if begun is not None and begun.is_finished:
            return begun
        token_ids = begun.step.token_ids if begun is not None else ()
        if self.config.rewrite == "speculate":
            rest = yield from self.writer.speculate(sampling, token_ids)
        else:
            rest = yield from self._write("target", sampling, token_ids)
        return rest if begun is None else self.writer.joined(begun, rest)

    def _keep_beginning(self) -> Written | None:
        """What a greedy rewrite would begin with: the target has read it, its KV is there.

        Of what it read, these are the tokens that it found most probable, one after the other.
        """
        drafted = self.drafted
        is_held = drafted.observation is not None and not drafted.scored
        is_greedy = self.config.rewrite_sampling.is_greedy
        if not drafted.seen or not is_greedy or not uses("beginning"):
            if is_held:
                self.writer.take_back(self.config.verifier.model)
            return None
        candidate, seen = max(drafted.seen, key=lambda pair: pair[1].num_greedy)
        if seen.num_greedy == 0:
            if is_held:
                self.writer.take_back("target")
            return None
        if not is_held:
            self.writer.commit("target", replace(candidate, handle=seen.handle))
        self.writer.commit("draft", candidate)
        self.writer.append(candidate.token_ids[: seen.num_greedy])
        self.writer.take_back("target")
        self.writer.take_back("draft")
        return Written.beginning(candidate, seen)

    def write_alone(self) -> Work[StepRecord]:
        """The next step by one model, nothing judging it; "sd" lets the draft guess tokens."""
        method, sampling = self.config.method, self.config.step_sampling
        if self.fallback.is_on:
            self.fallback.saw_plain()
            work = self._write("target", self.config.rewrite_sampling)
            written = yield from self.ledger.timed("rewrite", work)
            return self.ledger.record("plain", "target", written, is_fallback=True)
        if method == "sd":
            written = yield from self.ledger.timed("rewrite", self.writer.speculate(sampling))
            return self.ledger.record("plain", "target", written)
        author: Author = "target" if method == "target" else "draft"
        written = yield from self.ledger.timed("propose", self._write(author, sampling))
        drafted = Drafted([written.step]) if author == "draft" else None
        return self.ledger.record("plain", author, written, drafted)

    def _write(
        self, author: Author, sampling: Sampling, begun: tuple[int, ...] = ()
    ) -> Work[Written]:
        [step] = yield from self.writer.propose(author, 1, sampling, begun)
        self.writer.commit(author, step)
        self.writer.append(step.token_ids)
        return Written(step)

    def _judged(self, author: Author, written: Written) -> StepRecord:
        is_accepted = author == "draft"
        decision: Decision = "accepted" if is_accepted else "rewritten"
        step = self.ledger.record(decision, author, written, self.drafted)
        self.fallback.saw_drafted(
            num_candidates=len(self.drafted.candidates),
            num_longest=max(len(one.token_ids) for one in self.drafted.candidates),
            num_tokens=step.num_tokens,
            num_rewritten=0 if is_accepted else step.num_tokens - step.num_reused,
        )
        return step

    def close(self) -> None:
        """Close every sequence."""
        self.writer.close()
        if self.judge is not None:
            self.judge.close()


def _judge(problem: str, reward: RewardModel | None, config: SolveConfig) -> RewardSequence | None:
    """What judges steps in reward-guided decoding, None in every other method."""
    if config.method != "rsd":
        return None
    if reward is None:
        raise UsageError("method 'rsd' needs a reward model", "name one, or choose another method")
    return reward.start(problem)


def _models_in_use(
    draft: LanguageModel[Any] | None, target: LanguageModel[Any] | None, config: SolveConfig
) -> dict[Author, LanguageModel[Any]]:
    """The models that the method needs.

    Raises:
        UsageError: one of them is missing.
        SpecguardError: the verifier weighs attention that its model cannot hand over.
    """
    given: dict[Author, LanguageModel[Any] | None] = {"draft": draft, "target": target}
    models: dict[Author, LanguageModel[Any]] = {}
    for author in config.authors:
        model = given[author]
        if model is None:
            raise UsageError(f"method {config.method!r} needs a {author} model")
        models[author] = model
    if config.method == "specguard" and config.verifier.needs_attention:
        refusal = models[config.verifier.model].capture_refusal
        if refusal is not None:
            raise SpecguardError(
                f"the attention of {models[config.verifier.model].name} cannot be captured: "
                f"{refusal}",
                "verify by log-probability alone: --beta 1",
            )
    return models
