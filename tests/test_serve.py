"""The server's protocol: what is answered, in which form, and what is refused."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from specguard.core import SolveConfig, Solver, VerifierConfig
from specguard.models.tiny import grammar
from tests.scripted import Scripted
from tests.serving import PROBLEM, Served, chunks_of, refusal_of, serving, text_of, tiny

GOOD, BAD, ANSWER = "Good.\n\n", "Bad.\n\n", "So \\boxed{7}."
LOG_PROB = VerifierConfig(weights={"log_prob": 1.0}, bounds={"log_prob": (-2.0, 0.0)})


def scripted(*steps: str, **settings: Any) -> Solver:
    """Drafts these steps; the target rejects the bad ones and writes good ones instead."""
    draft = Scripted("d", list(steps))
    target = Scripted("t", [GOOD], logprobs={BAD: -1.9}, lump=2)
    return Solver(draft, target, SolveConfig(verifier=LOG_PROB, **settings))


@pytest.fixture(scope="module")
def built_in() -> Iterator[Served]:
    with serving(tiny(), check=grammar.check) as served:
        yield served


def test_an_answer_is_the_unserved_one_with_its_record(built_in: Served) -> None:
    solution = tiny().solve(PROBLEM)
    answer = built_in.answer()
    [choice] = answer["choices"]
    assert choice["message"]["content"] == solution.text
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] == "stop"
    assert answer["object"] == "chat.completion"
    assert answer["usage"] == {
        "prompt_tokens": solution.stats.num_prompt_tokens,
        "completion_tokens": solution.stats.num_tokens,
        "total_tokens": solution.stats.num_prompt_tokens + solution.stats.num_tokens,
    }
    record = choice["specguard"]
    assert record["answer"] == "33"
    assert record["stats"]["num_accepted_steps"] == solution.stats.num_accepted_steps
    assert [step["text"] for step in record["steps"]] == [step.text for step in solution.steps]
    assert record["steps"][0]["label"] == "accepted draft"
    assert ">= 0.70" in record["steps"][0]["verdict"]


def test_a_stream_says_the_same_step_by_step(built_in: Served) -> None:
    chunks = built_in.chunks(stream_options={"include_usage": True})
    whole = built_in.answer()
    assert text_of(chunks) == whole["choices"][0]["message"]["content"]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    said = [chunk["choices"][0]["delta"].get("content") for chunk in chunks[1:-2]]
    assert said == [step["text"] for step in whole["choices"][0]["specguard"]["steps"]]
    *others, ending, last = chunks
    assert ending["choices"][0]["finish_reason"] == "stop"
    assert ending["choices"][0]["specguard"]["answer"] == "33"
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in [*others, ending])
    assert len({chunk["id"] for chunk in chunks}) == 1
    without = built_in.chunks()
    assert not any("usage" in chunk for chunk in without)


def test_what_the_target_writes_is_streamed_as_it_comes_and_drafts_only_once_accepted() -> None:
    with serving(scripted(GOOD, BAD, ANSWER), limits={"piece_seconds": 0}) as served:
        chunks = served.chunks("p", specguard={"stream_steps": True})
        choices = [chunk["choices"][0] for chunk in chunks[1:-1]]
        said = [(choice["delta"].get("content"), "specguard" in choice) for choice in choices]
        assert said[0] == (GOOD, True)
        assert said[1:5] == [("Go", False), ("od", False), (".\n", False), ("\n", False)]
        assert said[5] == ("", True), "the step's record comes with its end"
        assert said[6] == (ANSWER, True)
        record = choices[5]["specguard"]["step"]
        assert (record["decision"], record["draft_text"]) == ("rewritten", BAD)
        assert record["label"] == "rewritten by target"
        assert text_of(chunks) == served.answer("p")["choices"][0]["message"]["content"]


def test_texts_that_come_quickly_are_sent_together() -> None:
    with serving(scripted(GOOD, BAD, ANSWER), limits={"piece_seconds": 5}) as served:
        chunks = served.chunks("p")
        said = [chunk["choices"][0]["delta"].get("content") for chunk in chunks[1:-1]]
        assert said == [GOOD, GOOD, ANSWER]


def test_a_draft_that_writes_alone_is_streamed_as_it_comes_too() -> None:
    solver = Solver(Scripted("d", [GOOD, ANSWER], lump=3), None, SolveConfig(method="draft"))
    with serving(solver, limits={"piece_seconds": 0}) as served:
        chunks = served.chunks("p")
        assert [c["choices"][0]["delta"].get("content") for c in chunks[1:3]] == ["Goo", "d.\n"]
        assert text_of(chunks) == GOOD + ANSWER


def test_settings_of_a_request_hold_for_it_alone(built_in: Served) -> None:
    own = {"method": "target", "detail": True}
    record = built_in.answer(specguard=own)["choices"][0]["specguard"]
    assert record["method"] == "target"
    assert {step["author"] for step in record["steps"]} == {"target"}
    assert record["steps"][0]["tokens"] is not None
    strict = built_in.answer(specguard={"threshold": 1.0, "k": 2})["choices"][0]["specguard"]
    assert "rewritten" in {step["decision"] for step in strict["steps"]}
    assert {step["threshold"] for step in strict["steps"]} == {1.0}
    paper = built_in.answer(specguard={"preset": "paper", "detail": True}, seed=1)["choices"][0][
        "specguard"
    ]
    assert len(paper["steps"][0]["candidates"]) == 16
    solution = tiny().solve(PROBLEM, method="draft")
    drafted = built_in.answer(specguard={"method": "draft"})
    assert drafted["choices"][0]["message"]["content"] == solution.text
    assert built_in.answer()["choices"][0]["specguard"]["method"] == "specguard"


def test_several_choices_have_seeds_of_their_own(built_in: Served) -> None:
    more: dict[str, Any] = {"n": 3, "seed": 5, "temperature": 1.0, "max_tokens": 12}
    answer = built_in.answer(specguard={"method": "target"}, **more)
    choices = answer["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    assert [choice["specguard"]["seed"] for choice in choices] == [5, 6, 7]
    assert all(choice["finish_reason"] == "length" for choice in choices)
    assert answer["usage"]["completion_tokens"] == 36
    again = built_in.chunks(specguard={"method": "target"}, **more)
    for number, choice in enumerate(choices):
        assert text_of(again, number) == choice["message"]["content"]


def test_a_temperature_is_of_drafts_and_rewrites_and_draws_anew_without_a_seed() -> None:
    with serving(scripted(BAD, ANSWER)) as served:
        draft, target = served.solver.draft, served.solver.target
        seeds = {
            served.answer("p", temperature=0.5)["choices"][0]["specguard"]["seed"] for _ in range(3)
        }
        assert len(seeds) == 3
        assert isinstance(draft, Scripted)
        assert isinstance(target, Scripted)
        for job in (*draft.generated, *target.generated):
            assert job.sampling.temperature == 0.5
        assert served.answer("p")["choices"][0]["specguard"]["seed"] == 0
        assert served.answer("p", temperature=0)["choices"][0]["specguard"]["seed"] == 0
        assert (
            served.answer("p", temperature=0.5, seed=-1)["choices"][0]["specguard"]["seed"]
            == 2**64 - 1
        )


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_sequence_ends_the_text_before_it(stream: bool) -> None:
    # "Good" may yet become "Goods"; what the target writes is cut in the middle of its step.
    solver = scripted(GOOD, "Goo and more.\n\n", BAD, ANSWER)
    with serving(solver) as served:
        more = {"stop": ["d.\n\nGoo a", "Goods"], "stream": stream}
        response = served.chat("p", **more)
        if stream:
            chunks = chunks_of(response)
            assert text_of(chunks) == "Goo"
            assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        else:
            assert response.json()["choices"][0]["message"]["content"] == "Goo"
        target = served.solver.target
        assert isinstance(target, Scripted)
        assert not target.held, "what is not wanted any more is let go"
        assert served.answer("p", stop="od.")["choices"][0]["message"]["content"] == "Go"
        text = text_of(served.chunks("p", stop="more.\n\nGo", specguard={"fallback": False}))
        assert text == "Good.\n\nGoo and "


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"logprobs": True}, "logprobs is not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"best_of": True}, "best_of"),
        ({"no_such_option": 1}, "no_such_option is not supported"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"specguard": {"beam": 1}}, "specguard.beam"),
        ({"specguard": {"method": "magic"}}, "specguard.method"),
        ({"specguard": {"method": "target", "k": 4}}, "specguard.k has no meaning"),
        ({"specguard": {"threshold": 2}}, "threshold must lie in [0, 1]"),
        ({"specguard": {"k": 0}}, "num_candidates must be at least 1"),
        ({"specguard": {"method": "rsd"}}, "needs a reward model"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 1e-9}, "temperature must be 0"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "say different things"),
        ({"n": 100}, "16 answers at most"),
        ({"stop": [""]}, "a stop sequence is empty"),
        ({"stream_options": {"include_usage": True}}, "stream: true"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "the last message must be"),
        ({"messages": [{"role": "user", "content": " "}]}, "is empty"),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages.0.role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages.0.content",
        ),
    ],
)
def test_what_is_not_honoured_is_refused(more: dict[str, Any], named: str) -> None:
    with serving(scripted(ANSWER)) as served:
        assert named in served.refusal("p", **more)


def test_options_that_ask_for_nothing_are_taken() -> None:
    nothing = {
        "logprobs": False,
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "response_format": {"type": "text"},
        "tools": None,
        "user": "somebody",
        "metadata": {"a": "b"},
        "top_p": 1,
        "stop": None,
    }
    with serving(scripted(ANSWER)) as served:
        assert served.answer("p", **nothing)["choices"][0]["message"]["content"] == ANSWER


def test_what_the_pair_was_not_made_for_is_refused_unless_forced(built_in: Served) -> None:
    refused = built_in.refusal("What is the integral of x?")
    assert 'does not know the word "integral"' in refused
    assert "specguard.force" in refused
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROBLEM}]
    assert "no conversation" in built_in.refusal(messages=turns)
    forced = {"force": True, "method": "target"}
    answer = built_in.answer("What is the integral of x?", specguard=forced, max_tokens=8)
    assert answer["usage"]["completion_tokens"] == 8
    response = built_in.client.post("/v1/completions", json={"model": "m", "prompt": PROBLEM})
    assert "not texts to go on with" in refusal_of(response)
    with serving(tiny(), check=grammar.check, is_forced=True) as served:
        served.answer("What is the integral of x?", specguard={"method": "target"}, max_tokens=2)


def test_prompts_that_do_not_fit_or_are_no_text_are_refused(built_in: Served) -> None:
    force = {"force": True}
    response = built_in.chat("shells " * 3000, specguard=force)
    assert "context window" in refusal_of(response)
    assert response.json()["error"]["code"] == "context_length_exceeded"
    for body in (
        b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "m", "\\ud800": 1, "messages": [{"role": "user", "content": "p"}]}',
        b'{"model": "m", "messages": [{"role": "user", "content": "p"}], "seed": 1e400}',
        b'{"model": "m", "messages": [{"role": "user", "content": "p"}], "n": NaN}',
        b"[" * 100_000,
        b"\xff",
        b"",
        b"7",
    ):
        headers = {"content-type": "application/json"}
        response = built_in.client.post("/v1/chat/completions", content=body, headers=headers)
        refusal_of(response)


def test_completions_go_on_with_texts_or_token_ids() -> None:
    with serving(scripted(ANSWER)) as served:

        def complete(prompt: Any, **more: Any) -> Any:
            body = {"model": "m", "prompt": prompt, **more}
            return served.client.post("/v1/completions", json=body)

        answer = complete("ab").json()
        assert answer["object"] == "text_completion"
        assert answer["choices"][0]["text"] == ANSWER
        assert answer["usage"]["prompt_tokens"] == 2
        draft = served.solver.draft
        assert isinstance(draft, Scripted)
        assert served.solver.draft is not None
        assert draft.generated[0].prefix == (97, 98), "as it is, without a template"
        several = complete(["ab", "abc"], n=2).json()
        assert len(several["choices"]) == 4
        assert several["usage"]["prompt_tokens"] == 5
        assert complete([97, 98]).json()["usage"]["prompt_tokens"] == 2
        assert complete([[97, 98], [99]]).json()["usage"]["prompt_tokens"] == 3
        assert "do not know" in refusal_of(complete([100_000]))
        for nothing in "", [], [""], [[]]:
            assert "empty" in refusal_of(complete(nothing))
        chunks = chunks_of(complete("ab", stream=True))
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == ANSWER
        assert "echo" in refusal_of(complete("ab", echo=True))


def test_other_paths_and_models_are_not_there() -> None:
    with serving(scripted(ANSWER)) as served:
        assert "there is 'm'" in served.refusal("p", model="gpt", status=404)
        listed = served.client.get("/v1/models").json()
        assert [model["id"] for model in listed["data"]] == ["m"]
        assert served.client.get("/v1/models/m").json() == listed["data"][0]
        refusal_of(served.client.get("/v1/models/x"), 404)
        refusal_of(served.client.get("/v1/nothing"), 404)
        refusal_of(served.client.get("/v1/chat/completions"), 405)
        assert served.client.get("/health").json() == {"status": "ok"}


def test_metrics_count_what_was_done() -> None:
    with serving(scripted(GOOD, BAD, ANSWER)) as served:
        served.answer("p")
        served.refusal("p", model="gpt", status=404)
        served.client.get("/somewhere/else")
        lines = served.client.get("/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    chat = 'path="/v1/chat/completions"'
    assert values[f'specguard_requests_total{{{chat},status="200"}}'] == "1.0"
    assert values[f'specguard_requests_total{{{chat},status="404"}}'] == "1.0"
    assert values['specguard_requests_total{path="other",status="404"}'] == "1.0"
    assert values['specguard_steps_total{decision="accepted"}'] == "2.0"
    assert values['specguard_steps_total{decision="rewritten"}'] == "1.0"
    assert float(values['specguard_tokens_total{author="draft"}']) == len(GOOD + ANSWER)
    assert float(values['specguard_tokens_total{author="target"}']) == len(GOOD)
    assert values['specguard_solutions_total{finish_reason="answer"}'] == "1.0"
    assert values["specguard_solutions_running"] == "0.0"
    assert float(values["specguard_resident_bytes"]) > 0


def test_an_engine_that_fails_is_an_error_of_its_own_request() -> None:
    from specguard import SpecguardError

    solver = scripted(GOOD, ANSWER)
    target = solver.target
    assert isinstance(target, Scripted)
    target.fail_at, target.fail_on = "score", "broken"
    target.error = SpecguardError("the server behind is gone", "start it again")
    with serving(solver) as served:
        response = served.chat("broken")
        assert "the server behind is gone (start it again)" in refusal_of(response, 503)
        assert served.answer("p")["choices"][0]["finish_reason"] == "stop"
        target.fail_on = "Good"  # in the middle of a stream
        chunks = served.chunks("p")
        assert text_of(chunks[:-1]) == GOOD
        assert chunks[-1]["error"]["code"] == "engine_error"
        target.error = ZeroDivisionError("secret")
        failed = served.chunks("p")[-1]["error"]["message"]
        assert "its log says why" in failed
        target.fail_at = None
        assert served.answer("p")["choices"][0]["finish_reason"] == "stop"


def test_infinite_numbers_are_null_in_the_protocol() -> None:
    from specguard.serve.answers import encoded

    data = {"a": [float("inf"), 1.5], "b": {"c": float("nan")}}
    assert json.loads(encoded(data)) == {"a": [None, 1.5], "b": {"c": None}}
