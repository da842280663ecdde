"""Requests as the protocol has them, reduced to what is honoured here.

Everything else is refused, but for values that ask for nothing: ``"logprobs": false``.
"""

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from specguard.core.config import PRESETS, Author, Method

# Values by which an option that is not honoured asks for nothing, by its name; null always does.
_NOTHING: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "top_logprobs": (0,),
    "web_search_options": (),
    # Of messages that are handed back as they came.
    "annotations": ([],),
    "refusal": (),
}
# Labels for the accounts of whoever runs a server.
_LABELS = ("metadata", "prompt_cache_key", "safety_identifier", "user")


class Strict(BaseModel):
    """Refuses fields that it does not know, unless they ask for nothing."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {
            name: value
            for name, value in data.items()
            if value is not None
            and not (
                name not in cls.model_fields
                and (name in _LABELS or any(_is_same(value, it) for it in _NOTHING.get(name, ())))
            )
        }


def _is_same(value: Any, nothing: Any) -> bool:
    return value == nothing and isinstance(value, bool) == isinstance(nothing, bool)


class TextPart(Strict):
    """A part of a message; others than texts are refused."""

    type: Literal["text"]
    text: str


class Function(Strict):
    """What a tool call of an earlier turn called; the arguments are a JSON object as text."""

    name: str
    arguments: str = "{}"


class Call(Strict):
    """A tool call of an earlier turn."""

    id: str
    type: Literal["function"] = "function"
    function: Function


class Message(Strict):
    """One turn of a conversation, or instructions for it."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] = ""
    name: str | None = None
    tool_calls: list[Call] = []
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    @property
    def text(self) -> str:
        """What it says."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class FunctionTool(Strict):
    """A function that the model may call; ``parameters`` is a JSON schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] = False


class Tool(Strict):
    """A tool; there are functions only."""

    type: Literal["function"]
    function: FunctionTool


class StreamOptions(Strict):
    """``include_usage``: a last chunk says how many tokens there were."""

    include_usage: bool = False


class SpecguardOptions(Strict):
    """SpecGuard's own settings, for one request; see ``specguard solve --help``.

    ``fallback`` false drafts every step. ``detail`` keeps candidates and token arrays in the
    record, ``stream_steps`` sends every step's record with the chunk that ends it, and ``force``
    tries what the models were not made for.
    """

    method: Literal[get_args(Method)] | None = None  # type: ignore[valid-type]
    k: int | None = None
    verifier: Literal[get_args(Author)] | None = None  # type: ignore[valid-type]
    threshold: float | None = None
    preset: Literal[tuple(PRESETS)] | None = None  # type: ignore[valid-type]
    selector: str | None = None
    speculate: int | None = None
    fallback: bool = True
    thinking: bool | None = None
    max_step_tokens: int | None = None
    max_steps: int | None = None
    detail: bool = False
    stream_steps: bool = False
    force: bool = False


class Request(Strict):
    """What both kinds of requests have in common."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1)] = 1
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    specguard: SpecguardOptions = SpecguardOptions()


class ChatRequest(Request):
    """A conversation to go on with; ``max_completion_tokens`` is ``max_tokens`` by its new name."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: list[Tool] = []
    tool_choice: Literal["auto", "none"] = "auto"
    parallel_tool_calls: Literal[True] = True


class CompletionRequest(Request):
    """Texts, or token ids, to go on with as they are."""

    prompt: str | list[str] | list[int] | list[list[int]]
