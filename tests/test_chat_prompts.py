"""Conversations in chat templates: what the models read, and which part is the problem."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from specguard.backends.tokenizer import FolderTokenizer
from specguard.core import Prompt, SolveConfig, Solver, UsageError
from specguard.serve.prompts import chat_prompt
from specguard.serve.schema import Message, Tool
from tests.conftest import TINY
from tests.scripted import CharTokenizer, Scripted
from tests.serving import serving

# As Qwen's, in short: tools in the instructions, calls and what they bring in turns.
QWEN = (
    "{% if tools %}[tools]{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}"
    "{% for call in m.tool_calls %}<tool_call>{{ call.function.name }}("
    "{{ call.function.arguments.a }})</tool_call>{% endfor %}{% endfor %}[assistant]"
)
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
TURNS = (
    {"role": "user", "content": "2+2"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "2+2"},
)
CALLED = (
    *TURNS,
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "c", "function": {"name": "add", "arguments": '{"a": 7}'}}],
    },
    {"role": "tool", "tool_call_id": "c", "content": "It is 9."},
)


@pytest.fixture
def qwen(checkpoint: Path, tmp_path: Path) -> FolderTokenizer:
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text(QWEN)
    return FolderTokenizer(tmp_path)


def read(
    tokenizer: Any,
    turns: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] = (),
    **settings: Any,
) -> tuple[str, str]:
    """What the models read, and what of it is the problem."""
    messages = [Message.model_validate(turn) for turn in turns]
    config = SolveConfig(**settings)
    _, prompt = chat_prompt(tokenizer, messages, list(map(Tool.model_validate, tools)), config)
    ids, (start, stop) = prompt.token_ids, prompt.problem_span
    return tokenizer.decode(ids), tokenizer.decode(ids[start:stop])


def test_the_last_message_of_the_user_is_the_problem_and_earlier_turns_are_not(
    qwen: FolderTokenizer,
) -> None:
    text, problem = read(qwen, TURNS)
    assert text == "[user]2+2[assistant]4[user]2+2[assistant]"
    assert problem == "2+2"
    messages = [Message.model_validate(turn) for turn in TURNS]
    _, prompt = chat_prompt(qwen, messages, [], SolveConfig())
    before = qwen.decode(prompt.token_ids[: prompt.problem_span[0]])
    assert before == "[user]2+2[assistant]4[user]"


def test_instructions_of_a_conversation_stand_in_for_the_servers(qwen: FolderTokenizer) -> None:
    own = {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]}
    text, _ = read(qwen, (own, *TURNS), system_prompt="Step by step.")
    assert text.startswith("[system]Be brief.[user]")
    text, _ = read(qwen, TURNS, system_prompt="Step by step.")
    assert text.startswith("[system]Step by step.[user]")
    one = read(qwen, TURNS[:1], system_prompt="Step by step.")
    prompt = qwen.encode_prompt("2+2", "Step by step.", False)
    assert one[0] == qwen.decode(prompt.token_ids), "one message is the problem as it always was"


def test_what_tools_say_belongs_to_the_problem(qwen: FolderTokenizer) -> None:
    text, problem = read(qwen, CALLED, (ADD,))
    assert text.startswith('[tools][{"type": "function", "function": {"name": "add"')
    assert text.endswith("[assistant]<tool_call>add(7)</tool_call>[tool]It is 9.[assistant]")
    assert problem.startswith("2+2[assistant]<tool_call>")
    assert problem.endswith("It is 9.")


def test_a_template_without_a_place_for_tools_refuses_them() -> None:
    tokenizer = FolderTokenizer(TINY / "target")
    with pytest.raises(UsageError, match="no place for tools"):
        read(tokenizer, TURNS, (ADD,))
    assert read(tokenizer, TURNS)[1] == "2+2"


def test_without_a_template_a_conversation_says_who_speaks(
    checkpoint: Path, tmp_path: Path
) -> None:
    for file in checkpoint.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    text, problem = read(FolderTokenizer(tmp_path), TURNS, system_prompt="Add.")
    assert text == "Add.\n\nUser: 2+2\n\nAssistant: 4\n\nUser: 2+2\n\nAssistant:"
    assert problem.strip() == "2+2"


def test_a_tokenizer_that_knows_problems_only_is_told_what_came_before() -> None:
    text, problem = read(CharTokenizer(), TURNS, system_prompt="Add.")
    assert text == "\x01Add.\n\nUser: 2+2\n\nAssistant: 42+2\x02"
    assert problem == "2+2"
    with pytest.raises(UsageError, match="no place for tools"):
        read(CharTokenizer(), TURNS, (ADD,))
    with pytest.raises(UsageError, match="no place for tools"):
        read(CharTokenizer(), CALLED)


@pytest.mark.parametrize("arguments", ["7", "{", "[" * 100_000])
def test_arguments_of_a_call_are_a_json_object(qwen: FolderTokenizer, arguments: str) -> None:
    call = {"id": "c", "function": {"name": "add", "arguments": arguments}}
    turns = ({"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]})
    with pytest.raises(UsageError, match="must be a JSON object"):
        read(qwen, (*turns, {"role": "tool", "content": "y"}))


class ChatTokenizer(CharTokenizer):
    """Knows conversations."""

    def encode_text(self, text: str) -> Prompt:
        raise AssertionError("this is a conversation")

    def encode_chat(
        self,
        turns: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        thinking: bool,
    ) -> Prompt:
        problem = self.encode(turns[-1]["content"])
        return Prompt((1, *problem, 2), (1, 1 + len(problem)))


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_call_is_handed_to_the_client_and_ends_the_turn(stream: bool) -> None:
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n\n'
    engine = Scripted("t", ["I add.\n\n", call, "Never said.$"], lump=3, tokenizer=ChatTokenizer())
    with serving(Solver(None, engine, SolveConfig(method="target"))) as served:
        if stream:
            chunks = served.chunks("p", tools=[ADD])
            deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
            assert "".join(delta.get("content", "") for delta in deltas) == "I add.\n\n"
            [[made]] = [delta["tool_calls"] for delta in deltas if "tool_calls" in delta]
            assert made.pop("index") == 0
            reason = chunks[-1]["choices"][0]["finish_reason"]
        else:
            [choice] = served.answer("p", tools=[ADD])["choices"]
            assert choice["message"]["content"] == "I add.\n\n"
            [made] = choice["message"]["tool_calls"]
            reason = choice["finish_reason"]
        assert reason == "tool_calls"
        assert made.pop("id").startswith("call_")
        assert made == {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
        text = served.answer("p", tools=[ADD], tool_choice="none")["choices"][0]["message"]
        assert text["content"].endswith("Never said."), "tools that are not offered are not called"
