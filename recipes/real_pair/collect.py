"""Collects labelled reasoning steps of a draft and a target. Started again, it goes on.

A. ``solutions.jsonl``: the target, greedy, on shuffled problems.
B. ``candidates.jsonl``: at every step of a right solution, 8 sampled steps of the draft and its
   greedy one.
C. ``labels.jsonl``: of two of them, whether the target still reaches the gold answer.
D. ``labels_repeat.jsonl``: 100 labels again, sampled.

Problems go in chunks; a chunk's A shares the target with C of the chunk before it, so that long
batches have no idle tails. README.md describes the files. Needs vLLM::

    python -m recipes.real_pair.collect --pair PAIR --data train.jsonl --output STEPS
"""

from collections.abc import Sequence
from pathlib import Path

import click

from recipes.real_pair.answers import Problem, grade, load_problems
from recipes.real_pair.engines import Queue, log, set_environment, use_fast_top_p
from recipes.real_pair.labels import Labeller
from recipes.real_pair.lines import Lines, Record
from recipes.real_pair.steps import DELIMITER, NUM_SAMPLED, SYSTEM, cut_steps, seed_of

TEMPERATURE, TOP_P = 0.7, 0.8
MAX_SOLUTION_TOKENS, MAX_STEP_TOKENS = 512, 256
TARGET_ROWS, TARGET_KV_BYTES = 64, int(1.5 * 2**30)
DRAFT_ROWS, DRAFT_KV_BYTES = 96, int(0.625 * 2**30)


class Collector:
    """The pair, the problems and the files in one folder."""

    def __init__(self, pair: Path, data: Path, output: Path) -> None:
        output.mkdir(parents=True, exist_ok=True)
        self.problems = load_problems(data)
        self.solutions = Lines(output / "solutions.jsonl")
        self.candidates = Lines(output / "candidates.jsonl")
        self.labels = Lines(output / "labels.jsonl")
        self.repeats = Lines(output / "labels_repeat.jsonl")
        self.log_state()
        set_environment()
        use_fast_top_p()
        self.target = Queue("target", pair / "coder-1.5b", TARGET_ROWS, TARGET_KV_BYTES)
        self.draft = Queue("draft", pair / "coder-0.5b", DRAFT_ROWS, DRAFT_KV_BYTES)
        self.tokenizer = self.target.tokenizer
        golds = {problem.index: problem.gold for problem in self.problems}
        self.labeller = Labeller(self.target, golds, self.labels, self.repeats)

    def run(self, num_right: int, chunk_size: int) -> None:
        """Collect until so many solutions are right, and all that is begun is labelled."""
        previous: Sequence[Problem] = []
        number = 0
        while True:
            start = number * chunk_size
            is_enough = sum(record["right"] for record in self.solutions.records) >= num_right
            is_new = start >= len(self.solutions.records)
            chunk = [] if is_enough and is_new else self.problems[start : start + chunk_size]
            if not chunk and not previous:
                break
            number += 1
            self.submit_solutions(chunk)
            self.labeller.submit(self._of(previous, self.candidates))
            self.target.drain(f"A of chunk {number}, C of the one before")
            self.submit_candidates(chunk)
            self.draft.drain(f"B of chunk {number}")
            self.log_state()
            previous = chunk
        self.labeller.submit_repeats(self.candidates.records)
        self.target.drain("D")
        self.log_state()

    def submit_solutions(self, problems: Sequence[Problem]) -> None:
        """Ask the target for the solutions that are not there yet."""
        done = {record["problem"] for record in self.solutions.records}
        for problem in problems:
            if problem.index not in done:
                self._submit_solution(problem)

    def _submit_solution(self, problem: Problem) -> None:
        messages = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": problem.question},
        ]
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        prompt_ids = self.tokenizer.encode(text, add_special_tokens=False)

        def finish(output: Record) -> None:
            answer, is_right = grade(output["text"], problem.gold)
            ids = output["token_ids"]
            steps = cut_steps(self._decode, ids)
            texts = [self.tokenizer.decode(ids[a:b], skip_special_tokens=True) for a, b in steps]
            boxed = (index for index, text in enumerate(texts) if "\\boxed" in text)
            self.solutions.append(
                {
                    "problem": problem.index,
                    "question": problem.question,
                    "gold": problem.gold_text,
                    "right": is_right,
                    "answer": answer,
                    "prompt_token_ids": prompt_ids,
                    **output,
                    "steps": steps,
                    "num_steps": len(steps),
                    "answer_step": next(boxed, None),
                }
            )

        self.target.submit(prompt_ids, finish, MAX_SOLUTION_TOKENS)

    def submit_candidates(self, problems: Sequence[Problem]) -> None:
        """Ask the draft for steps in right solutions, before the one with the answer."""
        done = {(record["problem"], record["step"]) for record in self.candidates.records}
        for solution in self._of(problems, self.solutions):
            if solution["right"]:
                for step in range(solution["answer_step"] or 0):
                    if (solution["problem"], step) not in done:
                        self._submit_position(solution, step)

    def _submit_position(self, solution: Record, step: int) -> None:
        problem, (start, end) = solution["problem"], solution["steps"][step]
        prefix = solution["prompt_token_ids"] + solution["token_ids"][:start]
        own = solution["token_ids"][start:end]
        outputs: dict[int | None, Record] = {}  # None: the greedy one

        def finish(output: Record, index: int | None) -> None:
            outputs[index] = output
            if len(outputs) < NUM_SAMPLED + 1:
                return
            self.candidates.append(
                {
                    "problem": problem,
                    "step": step,
                    "num_steps": solution["num_steps"],
                    "answer_step": solution["answer_step"],
                    "prompt_length": len(solution["prompt_token_ids"]),
                    "prefix_token_ids": prefix,
                    "own": {
                        "token_ids": own,
                        "text": self.tokenizer.decode(own),
                        "logprobs": solution["logprobs"][start:end],
                    },
                    "greedy": outputs[None],
                    "samples": [outputs[index] for index in range(NUM_SAMPLED)],
                }
            )

        self.draft.submit(
            prefix, lambda output: finish(output, None), MAX_STEP_TOKENS, stop=[DELIMITER]
        )
        for index in range(NUM_SAMPLED):
            self.draft.submit(
                prefix,
                lambda output, index=index: finish(output, index),  # type: ignore[misc]
                MAX_STEP_TOKENS,
                stop=[DELIMITER],
                temperature=TEMPERATURE,
                top_p=TOP_P,
                seed=seed_of("draft", problem, step, index),
            )

    def log_state(self) -> None:
        """How far the collection is."""
        shares = []
        for name, lines in (("solutions", self.solutions), ("labels", self.labels)):
            num_right = sum(record["right"] for record in lines.records)
            shares.append(f"{num_right} of {len(lines.records)} {name} right")
        counts = f"{len(self.candidates.records)} positions, {len(self.repeats.records)} repeats"
        log(", ".join([*shares, counts]))

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=False))

    @staticmethod
    def _of(problems: Sequence[Problem], lines: Lines) -> list[Record]:
        wanted = {problem.index for problem in problems}
        return [record for record in lines.records if record["problem"] in wanted]


@click.command()
@click.option(
    "--pair",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    required=True,
    help="Folder with coder-0.5b, the draft, and coder-1.5b, the target.",
)
@click.option(
    "--data",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    help="GSM8K's train.jsonl.",
)
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--right", default=260, show_default=True, help="Right solutions to collect.")
@click.option("--chunk", default=64, show_default=True, help="Problems a chunk.")
def main(pair: Path, data: Path, output: Path, right: int, chunk: int) -> None:
    """Collect labelled steps in the folder OUTPUT."""
    Collector(pair, data, output).run(right, chunk)
    log("ALL DONE")


if __name__ == "__main__":
    main()
