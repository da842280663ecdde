"""Labels: does the target, going on from a draft's step, still reach the gold answer?

Chooses the steps of a position, has the target continue them and writes down the outcomes.
"""

import random
from collections.abc import Callable, Sequence

from recipes.real_pair.answers import grade
from recipes.real_pair.engines import Queue
from recipes.real_pair.lines import Lines, Record
from recipes.real_pair.steps import seed_of

MAX_CONTINUATION_TOKENS = 512
TEMPERATURE = 0.7
NUM_EXTRA = 2  # sampled continuations where the greedy one fails
NUM_REPEATED_LABELS, NUM_REPEATS = 100, 3


def chosen_candidates(position: Record) -> list[tuple[str, int | None, Record, bool | None]]:
    """Kind, index among the samples, the candidate, and whether it was the first random pick.

    The greedy step, and a random sample that differs from it where there is one.
    """
    samples, greedy = position["samples"], position["greedy"]
    order = list(range(len(samples)))
    random.Random(seed_of("choose", position["problem"], position["step"])).shuffle(order)
    chosen: list[tuple[str, int | None, Record, bool | None]] = [("greedy", None, greedy, None)]
    for index in order:
        if samples[index]["token_ids"] != greedy["token_ids"]:
            chosen.append(("sample", index, samples[index], index == order[0]))
            break
    return chosen


def key_of(record: Record) -> tuple[int, int, str]:
    """What tells one label from all others."""
    return record["problem"], record["step"], record["kind"]


class Labeller:
    """Submits labels to the target, and writes each one when it is known."""

    def __init__(
        self, target: Queue, golds: dict[int, float], labels: Lines, repeats: Lines
    ) -> None:
        self._target = target
        self._golds = golds
        self._labels = labels
        self._repeats = repeats

    def submit(self, positions: Sequence[Record]) -> None:
        """Ask for the labels of the positions that are not there yet."""
        done = {key_of(record) for record in self._labels.records}
        for position in positions:
            for kind, index, candidate, is_first_pick in chosen_candidates(position):
                if (position["problem"], position["step"], kind) not in done:
                    self._submit_label(position, kind, index, candidate, is_first_pick)

    def _submit_label(
        self,
        position: Record,
        kind: str,
        index: int | None,
        candidate: Record,
        is_first_pick: bool | None,
    ) -> None:
        problem, step, ids = position["problem"], position["step"], candidate["token_ids"]
        answer, is_answer_right = grade(candidate["text"], self._golds[problem])
        record = {
            "problem": problem,
            "step": step,
            "num_steps": position["num_steps"],
            "answer_step": position["answer_step"],
            "kind": kind,
            "candidate": index,
            "first_pick": is_first_pick,
            "multiplicity": sum(sample["token_ids"] == ids for sample in position["samples"]),
            "token_ids": ids,
            "text": candidate["text"],
            "logprobs": candidate["logprobs"],
            "finish": candidate["finish"],
            "same_as_own": ids == position["own"]["token_ids"],
            "answer_in_candidate": answer,
            "answer_in_candidate_right": is_answer_right if answer is not None else None,
        }
        continuations: list[Record] = []

        def write(method: str, outcomes: list[bool]) -> None:
            result = {"method": method, "right": outcomes[0], "outcomes": outcomes}
            self._labels.append({**record, **result, "continuations": continuations})

        if record["same_as_own"]:
            write("own", [True])
            return
        if candidate["finish"] == "eos":  # the solution is over: nothing to go on from
            write("eos", [is_answer_right])
            return

        def finish(continuation: Record) -> None:
            continuations.append(continuation)
            number = continuation["number"]
            if number == 0 and not continuation["right"]:
                for extra in range(1, 1 + NUM_EXTRA):
                    seed = seed_of("label", problem, step, kind, extra)
                    self._continue(position, ids, extra, finish, seed)
            elif number == 0 or len(continuations) == 1 + NUM_EXTRA:
                continuations.sort(key=lambda item: item["number"])
                write("continued", [item["right"] for item in continuations])

        self._continue(position, ids, 0, finish)

    def submit_repeats(self, positions: Sequence[Record]) -> None:
        """Ask for new continuations of random labels, to measure how noisy labels are."""
        labels = {key_of(label): label for label in self._labels.records}
        by_place = {(record["problem"], record["step"]): record for record in positions}
        done = {key_of(record) for record in self._repeats.records}
        eligible = sorted(key for key, label in labels.items() if label["method"] != "eos")
        number = min(NUM_REPEATED_LABELS, len(eligible))
        for key in random.Random(1).sample(eligible, number):
            if key not in done:
                self._submit_repeat(labels[key], by_place[key[:2]])

    def _submit_repeat(self, label: Record, position: Record) -> None:
        continuations: list[Record] = []

        def finish(continuation: Record) -> None:
            continuations.append(continuation)
            if len(continuations) == NUM_REPEATS:
                continuations.sort(key=lambda item: item["number"])
                fields = ("problem", "step", "kind", "method", "right")
                self._repeats.append(
                    {
                        **{name: label[name] for name in fields},
                        "first_outcomes": label["outcomes"],
                        "outcomes": [item["right"] for item in continuations],
                        "continuations": continuations,
                    }
                )

        for number in range(NUM_REPEATS):
            seed = seed_of("repeat", *key_of(label), number)
            self._continue(position, label["token_ids"], number, finish, seed)

    def _continue(
        self,
        position: Record,
        token_ids: list[int],
        number: int,
        finish: Callable[[Record], None],
        seed: int | None = None,
    ) -> None:
        """Let the target go on from a step, greedily where there is no seed."""
        prefix = position["prefix_token_ids"] + token_ids
        so_far = self._target.tokenizer.decode(prefix[position["prompt_length"] :])
        gold = self._golds[position["problem"]]

        def grade_output(output: Record) -> None:
            answer, is_right = grade(so_far + output["text"], gold)
            fields = ("token_ids", "text", "finish")
            finish(
                {
                    "number": number,
                    **{name: output[name] for name in fields},
                    "answer": answer,
                    "right": is_right,
                }
            )

        self._target.submit(
            prefix,
            grade_output,
            MAX_CONTINUATION_TOKENS,
            seed=seed,
            temperature=0.0 if seed is None else TEMPERATURE,
        )
