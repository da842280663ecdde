"""The command line, in process and as a real subprocess."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import specguard
from specguard.cli.main import main
from specguard.core import DraftCost
from specguard.costs.probe import Measurement
from specguard.models.settings import settings_path
from tests.conftest import TINY

SHELLS = (
    "Mia has 24 shells. Mia sells half of the shells. Then Mia finds 9 more shells. "
    "How many shells does Mia have?"
)


def invoke(*arguments: str, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(main, arguments, input=stdin, catch_exceptions=False)


def command(*arguments: str, **settings: object) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        [sys.executable, "-m", "specguard.cli", *arguments], capture_output=True, **settings
    )


def test_a_problem_is_solved_and_shown() -> None:
    result = invoke("solve", SHELLS)
    assert result.exit_code == 0
    assert "Answer: 21" in result.stdout
    assert "[1] accepted draft" in result.stdout or "[1] rewritten by target" in result.stdout
    assert "log-prob" in result.stdout
    for word in "tokens/s", "accepted", "target wrote", "Built-in pair":
        assert word in result.stderr
        assert word not in result.stdout.replace("accepted draft", "")


def test_json_is_one_object_and_nothing_else() -> None:
    result = invoke("solve", SHELLS, "--json", "--detail", "--k", "4")
    data = json.loads(result.stdout)
    assert result.stderr == ""
    assert data["answer"] == "21"
    assert {"answer", "text", "finish_reason", "steps", "stats"} <= data.keys()
    for step in data["steps"]:
        assert {"text", "accepted", "author", "scores"} <= step.keys()
        assert step["author"] in ("draft", "target")
        assert {"log_prob", "grounding", "ensemble"} <= step["scores"].keys()
        assert len(step["candidates"]) > 1


def test_jsonl_is_one_event_a_line() -> None:
    lines = invoke("solve", SHELLS, "--jsonl").stdout.splitlines()
    events = [json.loads(line) for line in lines]
    assert [event["event"] for event in events] == ["step"] * (len(events) - 1) + ["solution"]
    assert events[-1]["steps"] == [
        {key: value for key, value in event.items() if key != "event"} for event in events[:-1]
    ]


def test_quiet_prints_the_answer() -> None:
    result = invoke("solve", SHELLS, "--quiet")
    assert (result.stdout, result.stderr) == ("21\n", "")


@pytest.mark.parametrize("mode", [[], ["--quiet"], ["--json"], ["--jsonl"], ["--trace"]])
def test_no_answer_is_one_exit_code_with_advice(mode: list[str], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    mode = [*mode, str(page)] if mode == ["--trace"] else mode
    result = invoke("solve", SHELLS, "--max-tokens", "3", *mode)
    assert result.exit_code == 3
    assert result.stderr.splitlines()[-2:] == [
        "No answer: cut after 3 tokens.",
        "Hint: raise --max-tokens",
    ]
    # What there is of a solution is printed all the same.
    assert ("Mia" in result.stdout) == (mode != ["--quiet"])
    assert page.exists() == ("--trace" in mode)


def test_an_answer_without_a_box_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specguard.core.recorder.final_answer", lambda text: None)
    text = invoke("solve", SHELLS, "--quiet").stdout.strip()
    assert text.startswith("How many shells does Mia have?")
    assert f"Answer (last text, no box): {text}" in invoke("solve", SHELLS).stdout
    data = json.loads(invoke("solve", SHELLS, "--json").stdout)
    assert (data["answer"], data["answer_source"]) == (text, "text")


def test_problems_come_from_stdin_and_files(tmp_path: Path) -> None:
    assert invoke("solve", "-", "--quiet", stdin=SHELLS).stdout == "21\n"
    file = tmp_path / "problem.txt"
    file.write_text(f"\ufeff{SHELLS}\n", encoding="utf-8")
    assert invoke("solve", "--file", str(file), "--quiet").stdout == "21\n"


@pytest.mark.parametrize("method", ["target", "draft"])
def test_plain_methods(method: str) -> None:
    result = invoke("solve", SHELLS, "--method", method, "--json")
    data = json.loads(result.stdout)
    assert {step["author"] for step in data["steps"]} == {method}
    assert data["stats"]["step_acceptance_rate"] is None
    assert invoke("solve", SHELLS, "--method", method).exit_code == 0


@pytest.mark.parametrize(
    ("options", "selector"),
    [
        ([], "target"),
        (["--verifier", "draft"], "draft"),
        (["--preset", "paper"], "draft"),
        (["--preset", "consistency-only"], "draft"),
        (["--preset", "paper", "--selector", "target"], "target"),
        (["--selector", "numbers"], "numbers"),
    ],
)
def test_the_target_selects_where_it_verifies(options: list[str], selector: str) -> None:
    data = json.loads(invoke("solve", SHELLS, "--json", "--k", "2", *options).stdout)
    assert data["config"]["selector"] == selector
    assert data["answer"] == "21"


def test_tokens_are_guessed_where_asked() -> None:
    alone = json.loads(invoke("solve", SHELLS, "--method", "target", "--json").stdout)
    data = json.loads(invoke("solve", SHELLS, "--method", "sd", "--json").stdout)
    assert data["text"] == alone["text"]
    assert data["stats"]["num_kept_tokens"] > 0
    shown = invoke("solve", SHELLS, "--method", "sd", "--speculate", "6").stderr
    assert "guessed tokens" in shown


def test_options_reach_the_solver() -> None:
    options = [
        "--k",
        "3",
        "--seed",
        "5",
        "--beta",
        "0.5",
        "--threshold",
        "0",
        "--verifier",
        "draft",
    ]
    options += ["--sources", "context", "--selector", "ngram", "--temperature", "0.9"]
    options += ["--top-p", "0.9", "--max-step-tokens", "40", "--max-steps", "9", "--detail"]
    data = json.loads(invoke("solve", SHELLS, *options, "--json").stdout)
    assert data["config"]["seed"] == 5
    for step in data["steps"]:
        assert step["accepted"]
        assert step["threshold"] == 0
        assert len(step["candidates"]) == 3
        expected = 0.5 * step["scores"]["log_prob"] + 0.5 * step["scores"]["grounding"]
        assert step["scores"]["ensemble"] == pytest.approx(expected)
    assert data["stats"]["num_verified_tokens"] == 0


def test_the_paper_s_preset_is_the_published_ensemble() -> None:
    data = json.loads(invoke("solve", SHELLS, "--preset", "paper", "--json").stdout)
    for step in data["steps"]:
        scores = step["scores"]
        assert step["threshold"] == 0.7
        assert scores["ensemble"] == pytest.approx(
            0.3 * scores["log_prob"] + 0.7 * scores["grounding"]
        )


def test_what_drafting_costs_is_taken_as_it_is_given_and_recorded() -> None:
    figures = "0.4,0.02,2,0.01"
    data = json.loads(invoke("solve", SHELLS, "--draft-cost", figures, "--json").stdout)
    assert data["config"]["draft_cost"] == {
        "candidate": 0.4,
        "further": 0.02,
        "verification": 2.0,
        "reading": 0.01,
        "source": "given",
    }
    dear = json.loads(invoke("solve", SHELLS, "--draft-cost", "1", "--json").stdout)
    assert dear["stats"]["num_fallback_steps"] == dear["stats"]["num_steps"]


def test_what_drafting_costs_is_measured_anew_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def measure(*_: object) -> Measurement:
        return Measurement(DraftCost(0.9, verification=9.0, source="measured"), {"all": 0.5})

    monkeypatch.setattr("specguard.costs.figure.measure", measure)
    assert "drafting" not in invoke("solve", SHELLS).stderr
    result = invoke("solve", SHELLS, "--draft-cost", "measure")
    assert "measured in 0.5 s what drafting costs here" in result.stderr
    assert "takes 1.20 times what the target alone takes, so the target writes" in result.stderr
    assert "accepted draft" not in result.stdout
    asked = invoke("solve", SHELLS, "--draft-cost", "measure", "--k", "2", "--selector", "draft")
    assert "--method target is faster" in asked.stderr
    assert "accepted draft" in asked.stdout


USAGE_ERRORS = [
    (["solve"], "give one problem"),
    (["solve", ""], "empty"),
    (["solve", "  \n"], "empty"),
    (["solve", "x", "--file", "y"], "give one problem"),
    (["solve", "--file", "/nonexistent"], "cannot be read"),
    (["solve", "--file", "/"], "cannot be read"),
    (["solve", "x", "--models", "tinny"], "did you mean 'tiny'"),
    (["solve", "x", "--backend", "cpuu"], "did you mean 'cpu'"),
    (["solve", "x", "--backend", "cuda:x"], "cuda:1"),
    (["solve", "x", "--backend", "cpu:1"], "leave the number out"),
    (["solve", "x", "--k", "0"], "'--k': 0 is not in the range"),
    (["solve", "x", "--k", "9" * 20], "'--k'"),
    (["solve", "x", "--k", "1000000"], "'--k': 1000000 is more than 4096"),
    (["solve", "x", "--k", "4", "--first-k", "5"], "--first-k must be from 2 to --k, 4, not 5"),
    (["solve", "x", "--k", "many"], "not a valid integer"),
    (["solve", "x", "--beta", "1.5"], "'--beta'"),
    (["solve", "x", "--beta", "nan"], "'--beta': 'nan' is no number"),
    (["solve", "x", "--threshold", "-1"], "'--threshold'"),
    (["solve", "x", "--temperature", "-1"], "'--temperature'"),
    (["solve", "x", "--temperature", "inf"], "'--temperature'"),
    (["solve", "x", "--top-p", "0"], "'--top-p'"),
    (["solve", "x", "--max-tokens", "-5"], "'--max-tokens'"),
    (["solve", "x", "--max-steps", "0"], "'--max-steps'"),
    (["solve", "x", "--seed", "-1"], "'--seed'"),
    (["solve", "x", "--seed", "9" * 20], "'--seed'"),
    (["solve", "-5 + 3"], 'specguard solve -- "-5 + 3"'),
    (["solve", "x", "--selector", "vibes"], "no selector"),
    (["solve", "x", "--draft-cost", "cheap"], "one to four numbers, or measure, not 'cheap'"),
    (["solve", "x", "--draft-cost", "1,2,3,4,5"], "one to four numbers"),
    (["solve", "x", "--draft-cost", "0.4,-1"], "not negative"),
    (["solve", "x", "--draft-cost", "0.4", "--no-fallback"], "exclude one another"),
    (["solve", "x", "--method", "target", "--draft-cost", "0.4"], "--draft-cost has no meaning"),
    (["solve", "x", "--method", "target", "--k", "4"], "--k has no meaning"),
    (["solve", "x", "--method", "draft", "--beta", "0.4"], "--beta has no meaning"),
    (["solve", "x", "--method", "draft", "--rewrite-temperature", "1"], "no meaning"),
    (["solve", "x", "--speculate", "-1"], "'--speculate'"),
    (
        ["solve", "x", "--method", "target", "--speculate", "3"],
        "use --method sd or specguard or rsd",
    ),
    (["solve", "x", "--method", "sd", "--speculate", "0"], "num_speculated must be at least 1"),
    (["solve", "x", "--draft-backend", "cpuu"], "did you mean 'cpu'"),
    (["solve", "x", "--json", "--quiet"], "exclude one another"),
    (["solve", "x", "--detail"], "--detail"),
    (["solve", "x", "--thinking"], "no switch for thinking"),
    (["solve", "x", "--draft", str(TINY / "draft")], "go together"),
    (["solve", "x", "--nonsense"], "No such option"),
    (["solve", "x", "--backend", "auto:1"], "name the backend"),
    (["solve", "x", "--method", "target", "--top-p", "0.5"], "--temperature too"),
    (["solve", "x", "--preset", "paper", "--beta", "0.5"], "exclude one another"),
    (["solve", "x", "--system-prompt", "\udcff"], "not valid UTF-8"),
    (["calibrate", "mine", "--accept-wrong", "nan"], "'--accept-wrong': 'nan' is no number"),
    (["bench", "--output", "x", "--seeds", "0,9.5"], "'--seeds'"),
    (["bench", "--output", "x", "--limit", "9" * 20], "'--limit'"),
    (["bench", "--output", "x", "--methods", "magic"], "no method"),
    (["bench", "speed", "--k", "0,1"], "'--k'"),
    (["bench", "speed", "--acceptance", "0.5,nan"], "'--acceptance'"),
    (["models", "use", "qwen"], "did you mean"),
    (["models", "pull", "a/b", "--weights", "mlx"], "--weights"),
    (["models", "pull", "qwen2"], "did you mean"),
    (["models", "pull", "a/b/c"], "no hub id"),
]


@pytest.mark.parametrize(("arguments", "message"), USAGE_ERRORS)
def test_wrong_usage_exits_with_2(arguments: list[str], message: str) -> None:
    result = invoke(*(SHELLS if argument == "x" else argument for argument in arguments))
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("content", "message"), [(b"a\0b", "binary"), (b"caf\xe9 au lait", "not valid UTF-8 (byte 3)")]
)
def test_files_that_are_no_text(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "problem"
    file.write_bytes(content)
    for result in invoke("solve", "--file", str(file)), invoke("solve", "-", stdin=content):
        assert result.exit_code == 2
        assert message in result.stderr


def test_arguments_that_are_no_text() -> None:
    result = command(b"solve", b"caf\xe9")  # type: ignore[arg-type]
    assert result.returncode == 2
    assert b"not valid UTF-8" in result.stderr
    assert b"Traceback" not in result.stderr


def test_what_is_wrong_outside_exits_with_1(
    tmp_path: Path, checkpoint: Path, draft_checkpoint: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    tiny = str(TINY / "target")
    other = tmp_path / "other"
    other.mkdir()
    for file in checkpoint.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    vocabulary = json.loads((other / "tokenizer.json").read_text())
    tokens = vocabulary["model"]["vocab"]
    tokens["A"], tokens["B"] = tokens["B"], tokens["A"]
    (other / "tokenizer.json").write_text(json.dumps(vocabulary))
    cases = [
        (["--draft", str(tmp_path / "no"), "--target", tiny], "no model folder"),
        (["--draft", str(empty), "--target", tiny], "no config.json"),
        (["--draft", "nobody/nothing", "--target", tiny], "specguard models pull nobody/nothing"),
        (["--draft", str(other), "--target", tiny], "'B' is 35 in the draft and 36 in the target"),
        (["--models", "qwen2.5-math"], "specguard models pull"),
    ]
    for arguments, message in cases:
        result = invoke("solve", "x", *arguments)
        assert result.exit_code == 1, result.output
        assert message in result.stderr
        assert result.stdout == ""
    long = invoke("solve", "Mia has 2 shells. " * 500, "--force")
    assert long.exit_code == 1
    assert "the context window holds 2048" in long.stderr


def test_mlx_is_a_backend_like_the_others() -> None:
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    result = invoke("solve", SHELLS, "--backend", "mlx", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["answer"] == "21"
    wrong = invoke("solve", SHELLS, "--backend", "mlx:1")
    assert wrong.exit_code == 2
    assert "one device" in wrong.stderr


def test_a_missing_gpu_is_said() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA GPU")
    result = invoke("solve", "x", "--backend", "cuda")
    assert result.exit_code == 1
    assert "no CUDA GPU was found" in result.stderr
    assert "--backend cpu" in result.stderr


def test_uncalibrated_pairs_are_marked(checkpoint: Path, draft_checkpoint: Path) -> None:
    pair = ["--draft", str(draft_checkpoint), "--target", str(checkpoint), "--max-tokens", "3"]
    result = invoke("solve", "Mia has 3 shells.", *pair)
    assert result.exit_code == 3
    command = (
        f"specguard calibrate NAME --data FILE --draft {draft_checkpoint} --target {checkpoint}"
    )
    assert f"Uncalibrated: no verifier is fitted to this pair. To fit one: {command}" in (
        result.stderr
    )
    data = json.loads(invoke("solve", "Mia has 3 shells.", *pair, "--json").stdout)
    assert data["is_calibrated"] is False


def test_a_pair_that_is_one_model_twice_is_told_of(checkpoint: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(checkpoint)
    options = ["--target", str(checkpoint), "--max-tokens", "3", "--no-fallback"]
    said = "draft and target are the same model"
    assert said in invoke("solve", "x", "--draft", str(link), *options).stderr
    assert said not in invoke("solve", "x", "--draft", str(TINY / "target"), *options).stderr


def test_bounds_fitted_to_one_verifier_are_not_used_for_the_other() -> None:
    for verifier, calibrated in ("target", True), ("draft", False):
        data = json.loads(invoke("solve", SHELLS, "--verifier", verifier, "--json").stdout)
        assert data["is_calibrated"] == calibrated


def test_models_are_listed_with_what_they_need() -> None:
    result = invoke("models")
    assert result.exit_code == 0
    for word in (
        "tiny",
        "qwen2.5-math",
        "7.6B",
        "GB",
        "llama3",
    ):
        assert word in result.stdout


def test_the_chosen_pair_is_remembered() -> None:
    assert invoke("models", "use", "qwen2.5").exit_code == 0
    assert "qwen2.5 *" in invoke("models").stdout
    result = invoke("solve", "x")
    assert result.exit_code == 1
    assert "Qwen/Qwen2.5-1.5B-Instruct" in result.stderr
    assert invoke("models", "use", "tiny").exit_code == 0
    assert "Built-in pair" in invoke("solve", SHELLS).stderr
    settings_path().write_text("pair = [")
    broken = invoke("solve", "x")
    assert broken.exit_code == 1
    assert "cannot be read" in broken.stderr


def test_pulling_the_built_in_pair_needs_no_network() -> None:
    assert "already" in invoke("models", "pull", "tiny").stderr


def test_a_failed_download_is_one_line() -> None:
    result = invoke("models", "pull", "nobody/nothing")
    assert result.exit_code == 1
    assert "could not be downloaded" in result.stderr
    assert len(result.stderr.splitlines()) == 2


def test_backends_say_what_is_usable() -> None:
    result = invoke("backends")
    assert result.exit_code == 0
    for name in "cpu", "cuda", "mps", "mlx":
        assert name in result.stdout


def test_help_and_version() -> None:
    assert "solve" in invoke("--help").stdout
    assert "--threshold" in invoke("solve", "-h").stdout
    assert specguard.__version__ in invoke("--version").stdout


def test_no_colour_without_a_terminal() -> None:
    result = command("solve", SHELLS, env={**os.environ, "FORCE_COLOR": "", "TERM": "xterm"})
    assert result.returncode == 0
    assert b"\x1b[" not in result.stdout + result.stderr
    assert b"Answer: 21" in result.stdout


def test_a_closed_pipe_is_silent() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "specguard.cli", "solve", SHELLS, "--jsonl"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    process.wait()


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
def test_an_interrupt_exits_with_130_and_keeps_what_was_written() -> None:
    arguments = ["solve", SHELLS, "--jsonl", "--k", "1024", "--delimiter", "never"]
    arguments += ["--max-step-tokens", "8"]
    process = subprocess.Popen(
        [sys.executable, "-m", "specguard.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell starts its background jobs, and all they start, deaf to interrupts.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    first = process.stdout.readline()
    time.sleep(0.1)  # the next step is under way, deep in an engine
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate()
    assert process.returncode == 130
    assert errors == b"Interrupted.\n"
    assert first
    events = [json.loads(line)["event"] for line in [first, *rest.splitlines()]]
    assert set(events) == {"step"}
