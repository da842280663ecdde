"""llama.cpp itself, with the built-in pair as GGUF files; skipped where it is not installed.

The contract is run over it, too: .ci/engines.
"""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import specguard
from specguard.backends.checkpoint import read_gguf
from specguard.core import GREEDY, Capture, SpecguardError, UsageError, VerifierConfig
from specguard.models.tiny import problems
from tests.conftest import PROBLEM, TINY
from tests.contract.calls import FLAT, assert_same, capture, generate_job, run, score_job
from tests.engines import gguf_of, load, load_gguf
from tests.reference import ReferenceEngine
from tests.test_cli import SHELLS, invoke

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: .ci/engines runs this")

STEP = (45, 46, 47, 48)


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
    """The built-in pair."""
    return {role: str(gguf_of(TINY / role)) for role in ("draft", "target")}


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The target in float16, without its tokenizer.json."""
    from recipes.gguf import write

    path = tmp_path_factory.mktemp("half") / "half.gguf"
    return write(TINY / "target", path, is_half=True, has_tokenizer=False)


def test_the_built_in_pair_writes_what_torch_writes(files: dict[str, str]) -> None:
    """Greedy, in float32: each model alone, and both together."""
    options: dict[str, Any] = {"draft_cost": None, "engine_args": {"n_threads": "1"}}
    ours = specguard.load("tiny", **files, **options)
    theirs = specguard.load("tiny", backend="cpu", dtype="float32", draft_cost=None)
    judged = VerifierConfig(
        model="target", weights={"log_prob": 1.0}, bounds={"log_prob": (-0.5, 0.0)}
    )
    grounded = VerifierConfig(weights={"log_prob": 0.3, "grounding": 0.7}, sources="problem")
    pair: dict[str, Any] = {"num_candidates": 2, "selector": "draft"}
    decisions = set()
    for settings, count in (
        ({"method": "target"}, 20),
        ({"method": "draft"}, 20),
        ({**pair, "verifier": judged}, 5),
        ({**pair, "verifier": grounded}, 5),
        ({**pair, "selector": "target", "num_candidates": 4, "verifier": judged}, 5),
    ):
        for problem in islice(problems.stream(problems.HELD_OUT), count):
            found, wanted = (each.solve(problem.text, **settings) for each in (ours, theirs))
            assert found.text == wanted.text
            told, expected = ([step.decision for step in each.steps] for each in (found, wanted))
            assert told == expected
            decisions |= set(told)
    assert {"accepted", "rewritten"} <= decisions


def test_attention_is_that_of_the_right_layers_rows_and_heads() -> None:
    """Within 1e-4 of torch's; what is next to it is further away than 0.01."""
    engines = [load_gguf(TINY / "target"), load("torch", TINY / "target")]
    prefix = engines[1].tokenizer.encode_prompt(PROBLEM, None, False).token_ids
    step = tuple(engines[1].tokenizer.encode(" Mia had 24 / 2, so Mia has 12 shells."))
    is_source = np.arange(len(prefix)) % 3 == 1
    job = score_job([step], prefix, capture=Capture(is_source, 4, 0.0))
    ours, theirs = ([_rows(block) for block in run(each, job)[0].blocks] for each in engines)
    for layer, rows in enumerate(ours):
        assert _distance(rows, theirs[layer]) < 1e-4
        for other in {0, 1, 2, 3} - {layer}:
            assert _distance(rows, theirs[other]) > 0.01
        assert _distance(rows[1:], theirs[layer][:-1]) > 0.01


def _rows(block: Any) -> Any:
    return np.concatenate([block.source_mass[:, None], block.sink_mass[:, None], block.step], 1)


def _distance(rows: Any, others: Any) -> float:
    return float(np.abs(rows - others).sum(-1).mean() / 2)


def test_nothing_of_llama_cpp_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    engine = load_gguf(TINY / "draft")
    run(engine, generate_job(engine))
    cut = Path(gguf_of(TINY / "draft")).read_bytes()[:-4]
    file = Path(gguf_of(TINY / "draft")).with_name("cut.gguf")
    file.write_bytes(cut)
    with pytest.raises(SpecguardError, match=r"cannot load .*cut.gguf") as caught:
        specguard.load(draft=str(file), target=str(file))
    assert "\n" not in caught.value.message
    assert "corrupted or incomplete" in caught.value.message
    assert capfd.readouterr() == ("", "")


def test_parameters_are_llama_cpp_s(files: dict[str, str]) -> None:
    from specguard.backends.llamacpp.arguments import parsed_arguments

    given = {"n_threads": "3", "type_k": "q8_0", "offload_kqv": "false"}
    of_model, of_context = parsed_arguments({**given, "n_gpu_layers": "7"})
    assert of_model == {"n_gpu_layers": 7}
    assert of_context == {"n_threads": 3, "type_k": 8, "offload_kqv": False}
    for name, value, message in (
        ("n_thread", "3", "llama.cpp has no parameter 'n_thread'"),
        ("n_threads", "many", "n_threads=many"),
        ("n_ubatch", "-1", "n_ubatch=-1"),
        ("type_k", "q9", "type_k=q9"),
        ("offload_kqv", "perhaps", "offload_kqv=perhaps"),
        ("kv_unified", "false", "set by specguard itself"),
        ("cb_eval", "1", "set by specguard itself"),
        ("progress_callback", "1", "no parameter 'progress_callback'"),
    ):
        with pytest.raises(UsageError, match=message):
            parsed_arguments({name: value})


def test_parameters_take_effect(files: dict[str, str]) -> None:
    short = load_gguf(TINY / "target", n_ctx="64")
    assert short.context_limit == 64
    with pytest.raises(SpecguardError, match="do not fit the context window of 64"):
        run(short, generate_job(short, tuple(range(30, 90)), 1, 9))
    fused = load_gguf(TINY / "target", flash_attn_type="1")
    assert "flash attention" in fused.reasons["attention"]
    plain = load_gguf(TINY / "target")
    job = score_job([STEP])
    np.testing.assert_allclose(
        run(fused, job)[0].token_logprobs, run(plain, job)[0].token_logprobs, atol=0.05
    )


def test_what_is_kept_moves_when_more_cells_are_taken(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from specguard.backends.llamacpp import layer, loading

    monkeypatch.setattr(layer, "_FIRST_CELLS", 256)
    monkeypatch.setattr(loading, "BATCH", 256)
    engine, plain = load_gguf(checkpoint), ReferenceEngine.load(checkpoint)
    prefix = tuple(30 + place % 70 for place in range(90))
    for key in "first", "second":
        [drawn] = run(engine, generate_job(engine, prefix, 1, 20, GREEDY, key=key))
    [pool] = engine.layer._pools  # type: ignore[attr-defined]
    assert pool.sequences.num_cells == 256
    longer = prefix + drawn.token_ids
    jobs: list[Any] = [generate_job(engine, longer, 6, 20, FLAT, key="first")]
    for key in "second", "first":
        job = score_job([STEP, STEP[:2]], longer, key=key, capture=capture(longer, "problem"))
        jobs.append(job)
    for job in jobs:
        assert_same(run(engine, job), run(plain, job))
    assert pool.sequences.num_cells == 512


def test_rounded_weights_are_not_reproducible_elsewhere(half: Path) -> None:
    from specguard.backends.llamacpp.loading import load_model

    engine = load_model(str(half), "float16", {"n_threads": "1"})
    assert engine.reasons.keys() == {"exact randomness"}
    plain = load_gguf(TINY / "target")
    assert "exact randomness" in plain.features
    assert engine.num_bytes_per_token * 2 == plain.num_bytes_per_token
    with pytest.raises(UsageError, match="not bfloat16"):
        load_model(str(half), "bfloat16")


@pytest.mark.parametrize("text", ["Mia has 24 shells.", "  Ñandú 中文 😀!\n\n", "<|im_end|>x", ""])
def test_llama_cpp_s_own_tokenizer_gives_back_the_text(half: Path, text: str) -> None:
    from specguard.backends.llamacpp.loading import Model
    from specguard.backends.llamacpp.tokenizer import GGUFTokenizer

    file = read_gguf(str(half))
    tokenizer = GGUFTokenizer(file, Model(file, {}))
    token_ids, places = tokenizer.encoded(text, is_whole=False)
    assert token_ids == tokenizer.encode(text)
    assert tokenizer.decode(token_ids) == text.replace("<|im_end|>", "")
    assert (places[0][0], places[-1][1]) == (0, len(text)) if text else not places
    if text.strip():
        prompt = tokenizer.encode_prompt(text, "Answer.", False)
        first, last = prompt.problem_span
        assert text.strip().replace("<|im_end|>", "") in tokenizer.decode(
            prompt.token_ids[first:last]
        )


def solved(*arguments: str) -> Any:
    result = invoke("solve", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_file_runs_beside_a_folder(files: dict[str, str]) -> None:
    data = solved(SHELLS, "--draft", str(TINY / "draft"), "--target", files["target"], "--k", "2")
    assert data["answer"] == "21"
    alone = solved(SHELLS, "--models", "tiny", "--backend", "cpu", "--k", "2")
    assert data["text"] == alone["text"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--engine-arg", "n_layer=3"), "llama.cpp has no parameter 'n_layer'"),
        (("--backend", "cpu"), "is a GGUF file, which the backend 'cpu' does not read"),
        (("--dtype", "bfloat16"), "are what they were written as, not bfloat16"),
    ],
)
def test_what_cannot_be_is_one_line(
    files: dict[str, str], options: tuple[str, ...], message: str
) -> None:
    result = invoke("solve", SHELLS, "--target", files["target"], "--method", "target", *options)
    assert result.exit_code == 2
    assert message in result.stderr
