"""Whatever stands in a solution, a browser shows it as text, and no part of the page."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specguard import Solution
from specguard.trace import render
from tests.test_trace import solution

pytestmark = pytest.mark.slow

HOSTILE = (
    *(
        "<script>window.gone = 1</script>",
        "</script><script>gone()//",
        "<img src=x onerror=gone()>",
    ),
    *("<svg onload=gone()>", '"><a href="javascript:gone()">x</a>', "' onmouseover='gone()' x='"),
    *('" autofocus onfocus="gone()" x="', "</style><style>*{display:none}</style>", "<!--", "-->"),
    *("<iframe src=//x>", "<base href=//x>", "<meta http-equiv=refresh content=0>", "<b>", "</li>"),
    *(
        "]]>",
        "&lt;b&gt;",
        "&#60;b&#62;",
        "{{ 7 * 7 }}",
        "{% raw %}",
        "${gone()}",
        "\\u003cb\\u003e",
    ),
    *("<plaintext>", "<textarea>", "</title>", "</body>", "\u202e", "<template>", "<math><mtext>"),
)
TEXTS = st.lists(
    st.one_of(
        st.sampled_from(HOSTILE),
        st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=8),
    ),
    min_size=1,
    max_size=6,
).map("".join)
# What the page consists of when nothing hostile is in it.
STRUCTURE = """
    return [...document.querySelectorAll('*')].map(
        element => element.tagName + '|' + [...element.attributes].map(a => a.name).sort())
"""


def with_texts(plain: Solution, text: str) -> Solution:
    """The same solution, every text in it another."""
    steps = []
    for step in plain.steps:
        tokens = step.tokens and replace(step.tokens, pieces=(text,) * len(step.tokens.pieces))
        candidates = tuple(replace(candidate, text=text) for candidate in step.candidates)
        draft_text = step.draft_text and text
        steps.append(
            replace(step, text=text, tokens=tokens, candidates=candidates, draft_text=draft_text)
        )
    names = {"draft": text, "target": text}
    return replace(plain, problem=text, answer=text, text=text, steps=tuple(steps), **names)


def test_no_text_becomes_part_of_the_page(browser: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    plain = solution()

    def shown(text: str) -> list[str]:
        page.write_text(render(with_texts(plain, text)), encoding="utf-8")
        browser.get(page.as_uri())
        structure: list[str] = browser.execute_script(STRUCTURE)
        return structure

    usual = shown("x")

    @given(TEXTS)
    @settings(
        max_examples=150,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    def is_text(text: str) -> None:
        assert shown(text) == usual
        assert browser.execute_script("return window.gone === undefined")
        content = browser.execute_script("return document.body.textContent")
        assert text in content

    is_text()
