"""What is said of a step and of a solution, alike in a terminal and on a page.

Knows records and settings, and nothing of terminals and pages.
"""

from specguard.core.config import REWARD, USUAL_TOKENS, SolveConfig
from specguard.core.records import Solution, StepRecord

_FEW = 0.2  # of the drafted steps; a pair that accepts no more has little of its draft
_NUM_JUDGED = 3  # drafted steps that show it


def label(step: StepRecord) -> str:
    """Who wrote a step, and what became of the draft's."""
    if step.decision == "accepted":
        return "accepted draft"
    if step.decision == "plain":
        return f"{step.author}, no draft" if step.is_fallback else step.author
    if is_same_text(step):
        return "rejected draft, target wrote the same"
    kept = f", {_counted(step.num_reused, 'token')} kept" if step.num_reused else ""
    return f"rewritten by target{kept}"


def is_same_text(step: StepRecord) -> bool:
    """Whether the target rewrote the draft's step as it was."""
    return step.draft_text is not None and step.draft_text.strip() == step.text.strip()


def drafted(step: StepRecord) -> str | None:
    """What the draft wrote of a step that the target wrote otherwise."""
    if step.draft_text is None or is_same_text(step):
        return None
    return step.draft_text.strip() + (" …" if step.is_given_up else "")


def decisive(config: SolveConfig) -> str | None:
    """What a step's score is: one signal's, the reward, the ensemble's; None where none decides."""
    if config.method == "rsd":
        return REWARD
    weighed = [name for name, weight in config.verifier.weights.items() if weight > 0]
    if len(weighed) > 1:
        return "ensemble"
    return spoken(weighed[0]) if weighed else None


def spoken(signal: str) -> str:
    """A signal's name for people."""
    return signal.replace("_", "-")


def is_telling(signal: str, config: SolveConfig) -> bool:
    """Whether a signal says anything: a single candidate is consistent with itself."""
    return signal != "consistency" or config.num_candidates > 1


def verdict(step: StepRecord, config: SolveConfig) -> str:
    """Why a step was accepted or not; "" where nothing judged it."""
    if step.threshold is None:
        return ""
    name = decisive(config)
    told = {
        spoken(signal): f"{spoken(signal)} {step.scores[signal]:.2f}"
        for signal in (*config.verifier.weights, "consistency")
        if signal in step.scores and is_telling(signal, config)
    }
    if name is None:
        return ", ".join(["not verified", *told.values()])
    others = [text for signal, text in told.items() if signal != name]
    score, threshold = compared(step.scores["ensemble"], step.threshold)
    relation = ">=" if step.scores["ensemble"] >= step.threshold else "<"
    comparison = f"{name} {score} {relation} {threshold}"
    return f"{comparison} ({', '.join(others)})" if others else comparison


def compared(score: float, threshold: float) -> tuple[str, str]:
    """Both numbers, with as many digits as tell a score below the threshold from it."""
    for num_digits in range(2, 17):
        texts = f"{score:.{num_digits}f}", f"{threshold:.{num_digits}f}"
        if score >= threshold or texts[0] != texts[1]:
            return texts
    return repr(score), repr(threshold)


def acceptance(solution: Solution) -> str | None:
    """How many of the draft's steps were accepted; None where there were none."""
    stats, share = solution.stats, solution.stats.token_acceptance_rate
    if share is None:
        return None
    drafted = _counted(solution.num_drafted_steps, "drafted step")
    return f"accepted {stats.num_accepted_steps} of {drafted}, {share:.0%} of their tokens"


def misfit(solution: Solution) -> str | None:
    """What to do about a pair that accepts almost nothing; None for any other."""
    num_drafted, num_accepted = solution.num_drafted_steps, solution.stats.num_accepted_steps
    if num_drafted < _NUM_JUDGED or num_accepted > _FEW * num_drafted:
        return None
    advice = (
        "its verifier may be fitted to another data type (--dtype)"
        if solution.is_calibrated
        else "fit a verifier to it with specguard calibrate, and try another data type (--dtype)"
    )
    return (
        f"Only {num_accepted} of {num_drafted} drafted steps were accepted. If this pair does so "
        f"again and again: {advice}."
    )


def no_answer(solution: Solution) -> tuple[str, str]:
    """Why a solution has no answer, and what to do."""
    config, stats = solution.config, solution.stats
    if solution.finish_reason == "repetition":
        return (
            "the text went round in circles",
            "try --temperature 0.7 with another --seed, or a larger pair",
        )
    if solution.finish_reason == "eos":
        return (
            "the model ended without a word",
            "try another --system-prompt, or a model that is tuned to follow instructions",
        )
    if stats.num_steps == config.max_steps:
        return f"cut after {_counted(stats.num_steps, 'step')}", "raise --max-steps"
    if stats.num_tokens == (config.max_tokens or USUAL_TOKENS):
        return f"cut after {_counted(stats.num_tokens, 'token')}", "raise --max-tokens"
    return (
        f"the context window is full after {_counted(stats.num_tokens, 'token')}",
        "shorten the problem, or choose a pair with a longer context",
    )


def _counted(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"
