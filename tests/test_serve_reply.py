"""What a client gets of a text: nothing too early, nothing past its end, calls of tools apart."""

import json
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from specguard.core.records import StepRecord
from specguard.serve.reply import Reply
from specguard.serve.tools import split_calls

TOOLS = frozenset({"add", "find"})
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2]}}\n</tool_call>'
TEXTS = st.text("ab<", max_size=20) | st.text(max_size=20)
BARE = '{"name": "add"}'
FENCES = ("```json\n", "\n```", "```")
PARTS = ("<tool_call>", "</tool_call>", "{", CALL, "a", " ", "\n", "<", BARE, *FENCES)


def step(text: str) -> StepRecord:
    return StepRecord(0, text, "target", "plain", 1, 0, {}, {}, None, {})


def given_by(reply: Reply, pieces: list[str], is_early: bool) -> str:
    """All that is sent: piece by piece, as tokens of a step that they make up or as steps."""
    sent = ""
    if is_early:
        for piece in pieces:
            sent += reply.tokens(piece, 1)
    for text in ["".join(pieces)] if is_early else pieces:
        if not reply.is_stopped:
            sent += reply.step(step(text))
    return sent + reply.finish()


def cut(text: str, places: list[int]) -> list[str]:
    ends = sorted({0, *(place % (len(text) + 1) for place in places), len(text)})
    return [text[start:end] for start, end in pairwise(ends)]


def stopped(text: str, stops: list[str]) -> str:
    """The text up to the stop sequence that is complete first, found the long way."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


@given(TEXTS, st.lists(st.text("ab<", min_size=1, max_size=4), max_size=3), st.data())
def test_a_text_ends_before_the_stop_sequence_however_it_comes(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    places = data.draw(st.lists(st.integers(0, 40), max_size=6))
    for is_early in False, True:
        reply = Reply(stops)
        sent = given_by(reply, cut(text, places), is_early)
        assert sent == reply.text == stopped(text, stops)


@given(st.lists(st.sampled_from(PARTS), max_size=8).map("".join), st.lists(st.integers(0, 200)))
@example('\n```{"name": "add"}\n```', [])
@example('``` json {"name": "add"}\n```', [3])
@example('```json{"name": "add"}```', [5, 7, 8])
def test_what_is_sent_is_the_text_without_calls_however_it_comes(
    text: str, places: list[int]
) -> None:
    reply = Reply((), TOOLS)
    sent = given_by(reply, cut(text, places), is_early=True)
    assert sent == reply.text
    rest, calls = split_calls(text, TOOLS)
    assert reply.calls == calls
    assert sent.rstrip() == rest.rstrip()
    assert CALL not in sent


def test_a_call_ends_the_turn_and_is_no_text() -> None:
    reply = Reply((), TOOLS)
    assert reply.step(step("Let me see.\n\n")) == "Let me see.\n\n"
    assert not reply.is_stopped
    assert reply.step(step(f"{CALL}\n{CALL}\n\n")) == ""
    assert reply.is_stopped
    assert reply.finish() == ""
    assert [(call.name, json.loads(call.arguments)) for call in reply.calls] == [
        ("add", {"a": 1, "b": [2]})
    ] * 2
    assert reply.text == "Let me see.\n\n"


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>{broken}</tool_call>",
        '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "add", "arguments": "1"}</tool_call>',
        '<tool_call>{"name": "add"',
        '{"name": "other", "parameters": {}}',
        "<tool_call>[]</tool_call>",
        "<tool_call>" + "[" * 100_000 + "</tool_call>",
    ],
)
def test_what_is_no_call_stays_in_the_text(text: str) -> None:
    reply = Reply((), TOOLS)
    assert reply.step(step(text)) + reply.finish() == text
    assert not reply.is_stopped
    assert reply.calls == []


def test_a_text_that_is_a_bare_call_is_one() -> None:
    reply = Reply((), TOOLS)
    assert reply.tokens(' {"name": "find", "para', 3) == ""
    assert reply.step(step(' {"name": "find", "parameters": {"x": "é"}}')) == ""
    assert reply.is_stopped
    assert reply.finish() == reply.text == ""
    assert reply.calls[0].arguments == '{"x": "é"}'


def test_a_fenced_block_that_is_nothing_but_a_call_is_one() -> None:
    text = '```json\n{\n  "name": "find",\n  "arguments": {"x": 1}\n}\n```'
    reply = Reply((), TOOLS)
    assert [reply.tokens(piece, 1) for piece in ("```", text[3:20])] == ["", ""]
    reply.step(step(text))
    assert reply.finish() == ""
    assert [call.name for call in reply.calls] == ["find"]
    reply = Reply((), TOOLS)
    assert reply.tokens("```", 1) + reply.tokens("python", 1) == "```python"


def test_without_tools_a_call_is_text() -> None:
    reply = Reply()
    assert reply.step(step(CALL)) == CALL
    assert not reply.is_stopped
