"""Requests made from the server's own schema, and bent: none may be a defect of ours."""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specguard.models.tiny import grammar
from tests.serving import Served, serving, tiny

pytestmark = pytest.mark.slow
PATHS = ("/v1/chat/completions", "/v1/completions")
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)
seen: Counter[int] = Counter()  # statuses
usual = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    # What is well formed is solved, too: forced.
    with serving(tiny(), check=grammar.check, is_forced=True, limits={"seconds": 10.0}) as server:
        yield server


def try_it(served: Served, path: str, body: Any) -> None:
    if isinstance(body, dict):
        body = {**body, "model": "m", "max_tokens": 3}
    content = json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    response = served.client.post(path, content=content, headers=headers)
    assert response.status_code < 500 or response.status_code == 504, (body, response.text)
    if response.status_code >= 400:
        assert response.json()["error"]["message"]
    seen[response.status_code] += 1


@pytest.mark.parametrize("path", PATHS)
def test_no_request_of_the_schema_is_a_defect(served: Served, path: str) -> None:
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    schema = schemathesis.openapi.from_dict(served.client.get("/openapi.json").json())

    @usual
    @given(schema[path]["POST"].as_strategy())
    def fuzz(case: Any) -> None:
        try_it(served, path, case.body)

    seen.clear()
    fuzz()
    assert {200, 400} <= seen.keys(), "some are solved, and some refused"


@pytest.mark.parametrize("path", PATHS)
def test_no_bent_request_is_a_defect(served: Served, path: str) -> None:
    good = {
        "messages": [{"role": "user", "content": "p"}, {"role": "tool", "content": "t"}],
        "prompt": "p",
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        "stream_options": {"include_usage": True},
        "specguard": {"method": "target"},
        **dict.fromkeys(("temperature", "top_p", "n", "seed", "stop", "stream", "tool_choice")),
        **dict.fromkeys(("max_completion_tokens", "logprobs", "response_format", "user")),
    }

    @usual
    @given(st.dictionaries(st.sampled_from(sorted(good)), ANYTHING, max_size=3), ANYTHING)
    def fuzz(bent: dict[str, Any], whole: Any) -> None:
        kept = {name: good[name] for name in ("messages" if "chat" in path else "prompt",)}
        try_it(served, path, {**kept, **bent})
        try_it(served, path, whole)

    fuzz()
