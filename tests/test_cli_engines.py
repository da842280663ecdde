"""The command line and what it says of the engines: where they run, what they lack."""

import json
from pathlib import Path

import pytest

from specguard.core.reference import VARIABLE
from tests.conftest import TINY, make_checkpoint
from tests.test_cli import SHELLS, invoke

SHORT = ("--max-tokens", "12", "--max-step-tokens", "6")


@pytest.mark.parametrize(("draft", "target"), [("mlx", "cpu"), ("cpu", "mlx")])
def test_draft_and_target_run_on_different_backends(draft: str, target: str) -> None:
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    options = ("--draft-backend", draft, "--backend", target)
    result = invoke("solve", SHELLS, *options, "--json", "--k", "2")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["answer"] == "21"
    assert data["stats"]["num_accepted_steps"] > 0
    assert data["is_reproducible"]
    for role in "draft", "target":
        assert Path(data[role]).resolve() == TINY / role
    # Both draw by the same uniforms: the solution is that of one backend.
    alone = json.loads(invoke("solve", SHELLS, "--backend", target, "--json", "--k", "2").stdout)
    for name in "text", "finish_reason", "config":
        assert data[name] == alone[name]


@pytest.fixture(scope="module")
def sliding(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A pair whose attention cannot be captured."""
    folders = [tmp_path_factory.mktemp(role) for role in ("draft", "target")]
    for seed, folder in enumerate(folders):
        make_checkpoint(folder, "Mistral", sliding_window=32, seed=seed)
    return ["--draft", str(folders[0]), "--target", str(folders[1]), "--backend", "cpu"]


def test_the_usual_verifier_needs_no_attention(sliding: list[str]) -> None:
    result = invoke("solve", "Mia has 3 shells.", *sliding, "--k", "2", *SHORT)
    assert result.exit_code == 3, result.output
    lines = result.stderr.splitlines()
    assert len(set(lines)) == len(lines)
    assert "attention" not in result.stderr
    silent = invoke("solve", "Mia has 3 shells.", *sliding, "--k", "2", *SHORT, "--json")
    assert json.loads(silent.stdout)["config"]["verifier"]["weights"] == {"log_prob_sum": 1.0}


def test_a_comparison_refuses_what_its_engines_lack(sliding: list[str], tmp_path: Path) -> None:
    options = ("bench", *sliding, "--limit", "1", "--output", str(tmp_path))
    refused = invoke(*options, "--methods", "draft,paper")
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "method 'paper' cannot be run" in refused.stderr
    assert "has no attention" in refused.stderr


def test_what_was_asked_for_is_not_changed_but_refused(sliding: list[str]) -> None:
    result = invoke("solve", "Mia has 3 shells.", *sliding, "--preset", "paper")
    assert result.exit_code == 1
    assert "has no attention (mistral has sliding-window layers)" in result.stderr
    assert "--beta 1" in result.stderr
    assert result.stdout == ""


def test_plain_decoding_is_not_said_to_verify(sliding: list[str]) -> None:
    result = invoke("solve", "Mia has 3 shells.", *sliding, "--method", "target", *SHORT)
    assert result.exit_code == 3, result.output
    assert "verified" not in result.stderr


def test_layers_that_are_not_fused_are_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path / "granite", "Granite")
    options = ("--draft", folder, "--target", folder, "--backend", "cpu", "--k", "2", *SHORT)
    result = invoke("solve", "Mia has 3 shells.", *map(str, options))
    assert result.exit_code == 3, result.output
    assert result.stderr.count("transformers' own layers run it") == 1
    assert "layers" not in invoke("solve", SHELLS).stderr


@pytest.mark.parametrize(
    "arguments", [["solve", "x", "--force"], ["bench", "speed", "--count", "1"]]
)
def test_a_reference_switch_that_is_neither_on_nor_off_is_refused(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "maybe")
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "SPECGUARD_REFERENCE must be 0 or 1, not 'maybe'" in result.stderr
    assert result.stdout == ""


def test_the_reference_switch_changes_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = json.loads(invoke("solve", SHELLS, "--no-fallback", "--json").stdout)
    monkeypatch.setenv(VARIABLE, "1")
    reference = json.loads(invoke("solve", SHELLS, "--no-fallback", "--json").stdout)
    assert reference["text"] == plain["text"]
    assert reference["stats"]["num_reused_tokens"] == 0


def test_a_reward_model_judges_where_it_is_asked_to(tmp_path: Path) -> None:
    data = json.loads(invoke("solve", SHELLS, "--method", "rsd", "--json").stdout)
    assert data["answer"] == "21"
    assert all(step["signals"].keys() == {"reward"} for step in data["steps"])
    reward = ("--reward", str(TINY / "reward"))
    named = invoke("solve", SHELLS, "--method", "rsd", *reward, "--json")
    assert json.loads(named.stdout)["text"] == data["text"]
    bench = ("bench", "--models", "tiny", "--limit", "1", "--output", str(tmp_path))
    for arguments in ("solve", SHELLS, *reward), (*bench, "--methods", "draft", *reward):
        refused = invoke(*arguments)
        assert refused.exit_code == 2
        assert "--reward has no meaning" in refused.stderr
    table = invoke(*bench, "--methods", "rsd,best-of-draft@2").stdout
    assert "| rsd | 1 |" in table
    assert "| best-of-draft@2 | 1 |" in table
