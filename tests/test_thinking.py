"""Models that think before they answer: thousands of short steps, and an answer behind them."""

import pytest

from specguard.core import GenerateJob, Prompt, Solution, SolveConfig, Solver, VerifierConfig
from specguard.core.context import opens_thinking
from specguard.core.many import solve_many
from tests.scripted import CharTokenizer, Scripted

LOG_PROB = VerifierConfig(weights={"log_prob": 1.0}, threshold=0.1)
WINDOW = 40_960
ANSWER = "So it is \\boxed{7}.\n\n"


class Opening(CharTokenizer):
    """A chat template that opens the thinking itself."""

    def encode_prompt(self, problem: str, system_prompt: str | None, thinking: bool) -> Prompt:
        prompt = super().encode_prompt(problem, system_prompt, thinking)
        return Prompt((*prompt.token_ids, *self.encode("<think>\n")), prompt.problem_span)


class Closing(CharTokenizer):
    """A chat template that says that there is nothing to be thought of."""

    def encode_prompt(self, problem: str, system_prompt: str | None, thinking: bool) -> Prompt:
        prompt = super().encode_prompt(problem, system_prompt, thinking)
        tail = self.encode("<think>\n\n</think>\n\n")
        return Prompt((*prompt.token_ids, *tail), prompt.problem_span)


def solve(texts: list[str], tokenizer: CharTokenizer | None = None, **settings: object) -> Solution:
    """Both models write the same steps, one after the other."""

    def script(name: str) -> Scripted:
        return Scripted(
            name, list(texts), context_limit=WINDOW, tokenizer=tokenizer or CharTokenizer()
        )

    solver = Solver(script("d"), script("t"), SolveConfig(verifier=LOG_PROB, selector="ngram"))
    return solver.solve("p", **settings)


def thoughts(count: int) -> list[str]:
    """Short steps with the habits of such models: doubts, and answers that are none yet."""
    habits = ["Wait,\n\n", "Hm.\n\n", "So \\boxed{3}?\n\n", "Wait,\n\n", "Wait,\n\n", "Wait,\n\n"]
    return [f"{i}\n\n" if i % 3 == 0 else habits[i // 3 % 6] for i in range(count)]


@pytest.mark.parametrize(
    ("way", "method", "num_steps"),
    [("opened", "specguard", 3000), ("asked", "target", 900), ("by itself", "target", 900)],
)
def test_no_cap_of_ours_cuts_thousands_of_steps(way: str, method: str, num_steps: int) -> None:
    is_opened = way == "opened"  # by the chat template
    texts = [
        *thoughts(num_steps),
        "That is all.\n</think>\n\n",
        "Let me see.\n\n",
        ANSWER,
        "More.$",
    ]
    if not is_opened:
        texts[0] = "<think>\n" + texts[0]
    solution = solve(
        texts, Opening() if is_opened else None, method=method, thinking=way == "asked"
    )
    assert (solution.answer, solution.finish_reason) == ("7", "answer")
    assert [step.text for step in solution.steps] == texts[:-1]


def test_without_thinking_the_usual_limits_hold() -> None:
    texts = [f"{i}.\n\n" for i in range(3000)]
    assert solve(texts).stats.num_tokens == 2048
    assert solve(texts, Closing()).stats.num_tokens == 2048
    assert solve([*thoughts(40), ANSWER]).answer == "3"
    assert solve(["the tag <think> opens \\boxed{2}.\n\n"]).answer == "2"


@pytest.mark.parametrize(("limit", "num_steps"), [({"max_tokens": 100}, 25), ({"max_steps": 9}, 9)])
def test_a_limit_that_is_given_holds_for_thinking_too(
    limit: dict[str, int], num_steps: int
) -> None:
    texts = [f"{i:02}\n\n" for i in range(90)]
    solution = solve(texts, Opening(), **limit)
    assert (len(solution.steps), solution.finish_reason) == (num_steps, "length")


def test_thinking_without_end_has_no_answer() -> None:
    texts = [f"Is it {i}? {'So it is. ' * 9}\\boxed{{{i}}}\n\n" for i in range(900)]
    solution = solve(texts, Opening())
    assert (solution.answer, solution.finish_reason) == (None, "length")
    assert solution.stats.num_prompt_tokens + solution.stats.num_tokens == WINDOW
    given_up = solve(["Hm. \\boxed{3}\n\n", "I do not know.$"], Opening())
    assert (given_up.answer, given_up.finish_reason) == (None, "eos")


def test_the_answer_may_stand_in_the_step_that_ends_the_thinking() -> None:
    solution = solve(["\\boxed{3}?\n\n", "No.</think>It is \\boxed{7}.\n\n"], Opening())
    assert (solution.answer, len(solution.steps)) == ("7", 2)
    # A box of the thinking is none that is left open.
    solution = solve(["\\boxed{3</think>}\n\n", ANSWER], Opening())
    assert solution.answer == "7"


def test_a_true_loop_in_thinking_is_stopped() -> None:
    for loop in (
        ["Wait,\n\n"],
        ["Let me check this again from the beginning.\n\n", "12 + 5 = 17.\n\n"],
        [f"Line {i} of a long and useless round.\n\n" for i in range(40)],
    ):
        solution = solve(["Hm.\n\n", *loop * 90], Opening())
        assert (solution.answer, solution.finish_reason) == (None, "repetition")
        assert solution.stats.num_tokens < 4 * len("".join(loop)) + 300


def test_said_again_and_again_is_not_yet_a_loop() -> None:
    check = ["Let me check.\n\n", "12 + 5 = 17.\n\n", "Yes.\n\n"]
    texts = [*["Wait,\n\n"] * 12, *check * 3, "Hm.\n\n", *check * 3, "</think>\n\n", ANSWER]
    assert solve(texts, Opening()).answer == "7"


def test_a_loop_within_one_step_of_thinking_is_stopped() -> None:
    assert solve(["ab" * 300], Opening()).finish_reason == "repetition"
    digits = "One third, written as a decimal number, is about 0." + "3" * 20
    texts = [digits, "3 or so.\n\n", "</think>\n\n", ANSWER]
    assert solve(texts, Opening(), max_step_tokens=100).answer == "7"
    # Behind the thinking, as elsewhere, a step that runs into its cap on a row of digits is one.
    assert solve(["</think>\n\n", digits], Opening()).finish_reason == "repetition"


def test_the_templates_are_told_apart() -> None:
    for tokenizer, is_open in (Opening(), True), (Closing(), False), (CharTokenizer(), False):
        assert opens_thinking(tokenizer, tokenizer.encode_prompt("<think>", None, True)) == is_open


def test_memory_is_kept_for_all_that_thinking_may_take() -> None:
    def write(job: GenerateJob) -> list[str]:
        return [ANSWER] * job.num_candidates

    def budget(tokenizer: CharTokenizer) -> int:
        engine = Scripted("t", write, context_limit=WINDOW, tokenizer=tokenizer)
        solver = Solver(target=engine, config=SolveConfig(method="target"))
        [outcome] = solve_many(solver, ["p"], memory_budget=1)
        return int(str(outcome.error).split(" bytes")[0].split()[-1])

    assert budget(Opening()) > 10 * budget(CharTokenizer())
