"""The page of a solution: what it holds, what it escapes, and that a browser shows it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from specguard import Solution
from specguard.cli.main import main
from specguard.core import SolveConfig, Solver, VerifierConfig
from specguard.trace import render
from tests.scripted import Scripted

NASTY = "<script>document.title = 'gone'</script><img src=x onerror=alert(1)> & {{ 7 * 7 }}"
WRONG, RIGHT, ANSWER = "<b>wrong</b>.\n\n", "right & good.\n\n", "So \\boxed{7}.\n\n"


def solution(detail: bool = True, written: str = RIGHT, **settings: Any) -> Solution:
    verifier = VerifierConfig(
        weights={"log_prob": 0.5, "grounding": 0.5},
        bounds={"log_prob": (-2.0, 0.0)},
        threshold=0.6,
    )
    draft = Scripted("d", [[WRONG, WRONG, RIGHT], [ANSWER] * 3])
    target = Scripted("t", [written], logprobs={WRONG: -1.9})
    settings = {"num_candidates": 3, "selector": "draft", "verifier": verifier, **settings}
    config = SolveConfig(detail=detail, **settings)
    return Solver(draft, target, config).solve(NASTY)


def test_the_page_shows_who_wrote_a_step_and_why() -> None:
    page = render(solution())
    assert page.count("<details") == 2
    assert "rewritten by target" in page
    assert "accepted draft" in page
    assert "ensemble 0.53 &lt; 0.60 (log-prob 0.05, grounding 1.00, consistency 0.80)" in page
    assert "accepted 1 of 2 drafted steps" in page
    assert "The draft&#39;s step, rejected" in page or "The draft's step, rejected" in page
    assert "log-prob &times; 0.5" in page
    assert 'title="threshold 0.6"' in page
    assert page.count('class="selected"') == 2
    assert "Tokens by log-prob" in page
    assert "Tokens by grounding" in page
    assert "uncalibrated" in page


def test_the_page_says_what_was_and_no_more() -> None:
    alone = VerifierConfig(weights={"log_prob": 1.0}, bounds={"log_prob": (-2.0, 0.0)})
    page = body(solution(written=WRONG, verifier=alone))
    assert "rejected draft, target wrote the same" in page
    assert "The draft's step, rejected" not in page
    assert "log-prob 0.05 &lt; 0.70 (consistency 0.80)" in page
    assert "ensemble" not in page, "one signal decides"
    draft = Scripted("d", [[WRONG], ["It is 7.$"]])
    single = Solver(draft, Scripted("t", [RIGHT]), SolveConfig(verifier=alone)).solve("p")
    page = body(single)
    assert "consistency" not in page, "a single candidate is consistent with itself"
    assert "<strong>It is 7.</strong>" in page
    assert "last text, no box; finished by eos" in page
    cut = body(solution(max_tokens=20))
    assert "<strong>none</strong>" in cut
    assert "cut after 20 tokens" in cut
    unseen = body(solution(verifier=VerifierConfig(weights={}, threshold=0.0)))
    assert "not verified" in unseen
    assert "ensemble" not in unseen


def body(solved: Solution) -> str:
    return render(solved).split("</style>")[1]


def test_everything_from_outside_is_escaped() -> None:
    page = render(solution())
    assert "<script" not in page
    assert "<img" not in page
    assert "<b>wrong" not in page
    assert "&lt;b&gt;wrong" in page
    assert "{{ 7 * 7 }}" in page
    # Nothing is fetched from anywhere.
    assert not re.search(r"""(src|href|url)\s*[=(]""", page.replace("src=x onerror", ""))


def test_a_solution_without_detail_has_a_page_too() -> None:
    page = render(solution(detail=False))
    assert page.count("<details") == 2
    assert "Candidates and tokens were not kept" in page
    plain = render(solution(method="target"))
    assert "rewritten" not in plain.split("</style>")[1]


def test_what_an_engine_does_not_say_is_left_out() -> None:
    nothing = dict.fromkeys(("attention", "hidden states", "entropy"), "it has none")
    engines = [
        Scripted(name, [[WRONG, RIGHT]], features=frozenset({"scoring"}), reasons=dict(nothing))
        for name in "dt"
    ]
    verifier = VerifierConfig(weights={"log_prob": 1.0})
    config = SolveConfig(
        num_candidates=2, selector="ngram", verifier=verifier, detail=True, max_steps=2
    )
    page = render(Solver(*engines, config).solve("p"))
    assert "Tokens by log-prob" in page
    for missing in "Tokens by grounding", "Tokens by entropy", "entropy", "None", "nan":
        assert missing not in page.split("</style>")[1], missing


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


def test_a_file_of_solve_becomes_a_page(tmp_path: Path) -> None:
    file = tmp_path / "solution.json"
    file.write_text(solution().to_json())
    result = run("trace", file)
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'solution.html'}\n")
    assert (tmp_path / "solution.html").read_text() == render(solution_from(file))
    assert run("trace", file, "-o", tmp_path / "page.html").exit_code == 0
    assert {entry.name for entry in tmp_path.iterdir()} == {
        "solution.json",
        "solution.html",
        "page.html",
    }


def solution_from(file: Path) -> Solution:
    return Solution.from_json(file.read_text())


def test_solve_writes_the_page_itself(tmp_path: Path) -> None:
    problem = "Mia has 24 shells. Mia finds 9 more shells. How many shells does Mia have?"
    result = run("solve", problem, "--quiet", "--k", "2", "--trace", tmp_path / "page.html")
    assert (result.exit_code, result.stdout) == (0, "33\n")
    assert "Tokens by grounding" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "is no JSON"),
        ("[1]", "holds no solution"),
        ('{"schema_version": 99}', "schema version 99"),
    ],
)
def test_what_is_no_solution_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "x.json"
    if content is not None:
        file.write_text(content)
    result = run("trace", file)
    assert result.exit_code == 1
    assert message in result.stderr
    assert not (tmp_path / "x.html").exists()


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "solution.json"
    file.write_text(solution().to_json())
    (tmp_path / "folder").mkdir()
    result = run("trace", file, "-o", tmp_path / "folder")
    assert result.exit_code == 1
    assert "is a folder" in result.stderr
    assert run("trace", file, "-o", file).exit_code == 1
    assert json.loads(file.read_text())
    assert {entry.name for entry in tmp_path.iterdir()} == {"solution.json", "folder"}


@pytest.mark.slow
def test_a_browser_shows_the_page(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    page = tmp_path / "page.html"
    page.write_text(render(solution()), encoding="utf-8")
    browser.get(page.as_uri())
    assert browser.title == "SpecGuard: 7"
    assert NASTY in browser.find_element(By.TAG_NAME, "body").text
    step = browser.find_element(By.ID, "step-1")
    tokens = step.find_element(By.CLASS_NAME, "tokens")
    assert not tokens.is_displayed()
    step.find_element(By.TAG_NAME, "summary").send_keys(Keys.ENTER)
    assert tokens.is_displayed()
    assert tokens.text == WRONG.strip()
    marks = browser.execute_script(
        "return [...document.querySelectorAll('.mark')].map(m => m.offsetLeft)"
    )
    assert marks[0] > 0
    assert browser.get_log("browser") == []
