"""Which pairs there are, what they need, what fits, what they ask of their models."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock

import specguard
from specguard.backends import memory
from specguard.backends.checkpoint import open_checkpoint
from specguard.backends.pytorch import loading as torch_loading
from specguard.backends.registry import EstimatedBackend, choose_backend
from specguard.core import Sampling, SpecguardError, UsageError
from specguard.core.config import THINKING_SAMPLING
from specguard.core.engine import GREEDY
from specguard.loading import choose, configure
from specguard.models import pairs
from specguard.models.families import FAMILIES
from specguard.models.needs import pair_needs
from specguard.models.pairs import PAIRS, find_pair
from specguard.models.settings import choose_pair
from tests.conftest import TINY, make_checkpoint
from tests.test_cli import SHELLS, invoke

GB = 10**9


def test_the_pairs_of_today_are_there() -> None:
    expected = {
        "qwen3": ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-8B"),
        "qwen3-0.6b-4b": ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-4B"),
        "qwen3-1.7b-32b": ("Qwen/Qwen3-1.7B", "Qwen/Qwen3-32B"),
        "qwen2.5-coder": (
            "Qwen/Qwen2.5-Coder-0.5B-Instruct",
            "Qwen/Qwen2.5-Coder-1.5B-Instruct",
        ),
        "deepseek-r1-1.5b-14b": (
            "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
            "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B",
        ),
        "llama3": ("meta-llama/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),
    }
    assert {name: find_pair(name).sources("torch") for name in expected} == expected
    assert find_pair("qwen2.5-coder-0.5b-7b").sources("mlx") == (
        "mlx-community/Qwen2.5-Coder-0.5B-Instruct-4bit",
        "mlx-community/Qwen2.5-Coder-7B-Instruct-4bit",
    )
    assert find_pair("llama3").target["mlx"] == "mlx-community/Meta-Llama-3.1-8B-Instruct-4bit"


def test_a_family_s_usual_pair_has_its_name_and_that_with_sizes() -> None:
    assert find_pair("qwen3-0.6b-8b") is find_pair("qwen3")
    assert find_pair("llama3-1b-8b") is PAIRS["llama3"]
    with pytest.raises(UsageError, match="no model pair") as caught:
        find_pair("qwen3-0.6b-9b")
    assert "did you mean 'qwen3-0.6b-" in caught.value.hint


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_drafts_are_smaller_and_every_model_is_used(family: pairs.Family) -> None:
    used = {size for sizes in family.pairs for size in sizes}
    assert used == family.models.keys()
    for draft, target in family.pairs:
        small, large = family.models[draft].size, family.models[target].size
        assert small.num_parameters < large.num_parameters / 2


def test_sizes_are_those_of_the_configs(tmp_path: Path) -> None:
    """A model of the shape that is written down has keys and values of that size."""
    folder = make_checkpoint(
        tmp_path / "qwen",
        "Qwen2",
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        hidden_size=896,
        intermediate_size=8,
    )
    [size, _] = PAIRS["qwen2.5-coder"].sizes or ()
    assert open_checkpoint(str(folder)).num_cached_numbers == size.num_cached_numbers


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine with as much memory as is said, whose processor computes with bfloat16."""
    figures = SimpleNamespace(available=20 * GB, total=64 * GB)
    monkeypatch.setattr(memory, "_OWN_CGROUPS", tmp_path / "none")
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: figures)
    monkeypatch.setattr(torch_loading, "_computes_bfloat16", lambda device: True)
    return figures


def listed(*options: str) -> dict[str, dict[str, object]]:
    result = invoke("models", *options, "--json")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return {pair["name"]: pair for pair in json.loads(result.stdout)["pairs"]}


def test_what_fits_is_what_loading_would_not_refuse(machine: SimpleNamespace) -> None:
    found = listed("--backend", "cpu")
    coder, qwen = found["qwen2.5-coder"], found["qwen3"]
    assert coder["weight_bytes"] == 2 * 2_030_000_000
    # Keys and values of 24 and 28 layers, two heads of 64 and 128, in two bytes.
    assert coder["cached_tokens"] == 1024 + 2048
    assert coder["cache_bytes"] == 2 * 3072 * 2 * (24 * 2 * 64 + 28 * 2 * 128)
    assert (coder["fits"], qwen["fits"], found["qwen3-0.6b-14b"]["fits"]) == (True, True, False)
    machine.available = coder["weight_bytes"] + coder["cache_bytes"] - 1  # type: ignore[operator]
    assert not listed("--backend", "cpu")["qwen2.5-coder"]["fits"]
    # Room for long thoughts.
    assert found["deepseek-r1"]["cached_tokens"] == 1024 + 8192


def test_numbers_take_what_the_backend_computes_with(
    machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_loading, "_computes_bfloat16", lambda device: False)
    for reads_halves, size in (True, 2), (False, 4):
        monkeypatch.setattr(torch_loading, "reads_halves", lambda known=reads_halves: known)
        coder = listed("--backend", "cpu")["qwen2.5-coder"]
        assert coder["weight_bytes"] == size * 2_030_000_000
        assert coder["cache_bytes"] == 4 * 3072 * 2 * (24 * 2 * 64 + 28 * 2 * 128)
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    assert listed("--backend", "mlx")["qwen2.5-coder"]["weight_bytes"] == pytest.approx(
        0.5625 * 2_030_000_000
    )


def test_what_is_on_disk_is_measured(
    machine: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, backend, device = choose_backend("cpu")
    assert isinstance(backend, EstimatedBackend)
    tiny = pair_needs(PAIRS["tiny"], backend, device)
    models = [open_checkpoint(str(TINY / role)) for role in ("draft", "target")]
    assert tiny.num_weight_bytes == 4 * sum(model.num_parameters for model in models)
    assert (tiny.is_on_disk, tiny.fits) == (True, True)
    # Half a download: its size is known all the same.
    half = Path(shutil.copytree(TINY / "draft", tmp_path / "half"))
    (half / "config.json").unlink()
    coder = PAIRS["qwen2.5-coder"]
    broken = replace(coder, draft={"torch": str(half)})
    assert (
        pair_needs(broken, backend, device).num_bytes
        == pair_needs(coder, backend, device).num_bytes
    )


def test_nothing_is_made_up_of_a_pair_whose_size_is_not_known(machine: SimpleNamespace) -> None:
    _, backend, device = choose_backend("cpu")
    unknown = replace(PAIRS["qwen3"], sizes=None)
    needs = pair_needs(unknown, backend, device)
    assert (needs.sizes, needs.num_bytes, needs.fits, needs.is_on_disk) == (None, None, None, False)
    elsewhere = replace(PAIRS["qwen3"], draft={"mlx": "a/b"}, target={"mlx": "a/c"})
    assert pair_needs(elsewhere, backend, device).fits is None


def test_the_list_is_readable_at_80_columns(
    machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose_pair("qwen3-0.6b-8b")
    result = invoke("models", "--backend", "cpu")
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) == 1 + len(PAIRS)
    assert "qwen3 * " in result.stdout
    assert "on cpu (20.0 GB free now)" in result.stderr
    shown = invoke("models", "show", "qwen3")
    for word in "mlx-community/Qwen3-8B-4bit", "boxed", "--thinking", "calibrate":
        assert word in shown.stdout
    refused = invoke("models", "--json", "pull", "qwen3")
    assert refused.exit_code == 2
    assert "--json has no meaning" in refused.stderr


def test_a_pair_that_is_not_here_is_pulled_whole() -> None:
    _, backend, _ = choose_backend("auto")
    own = "torch" if backend.weights == "torch" else "mlx"
    draft, target = PAIRS["qwen3"].sources(own)
    for load in (
        lambda: specguard.load("qwen3"),
        lambda: specguard.load("qwen3-0.6b-8b"),
        lambda: specguard.load(draft=draft, target=target),
    ):
        with pytest.raises(SpecguardError) as caught:
            load()
        assert caught.value.message == f"not on this disk: {draft} and {target}"
    assert caught.value.hint == f"download first: specguard models pull {draft} {target}"
    with pytest.raises(SpecguardError) as caught:
        specguard.load("qwen3")
    assert caught.value.hint == "download first: specguard models pull qwen3"
    # Only what is missed: the folder is here, and a plain method needs one model.
    with pytest.raises(SpecguardError) as caught:
        specguard.load("qwen3", draft=str(TINY / "draft"))
    assert caught.value.hint == f"download first: specguard models pull {target}"
    with pytest.raises(SpecguardError) as caught:
        specguard.load(draft=draft, target=target, method="target")
    assert caught.value.hint == f"download first: specguard models pull {target}"


def test_several_models_are_pulled_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pulled: list[str] = []
    monkeypatch.setattr("specguard.cli.models._download", pulled.append)
    assert invoke("models", "pull", "a/b", "qwen3", "a/b", "--weights", "mlx").exit_code == 2
    assert invoke("models", "pull", "a/b", "tiny", "c/d", "a/b").exit_code == 0
    assert pulled == ["a/b", "c/d"]
    assert invoke("models", "pull", "qwen3", "llama3", "--weights", "mlx").exit_code == 0
    assert pulled[2:] == [*PAIRS["qwen3"].sources("mlx"), *PAIRS["llama3"].sources("mlx")]


def test_what_killed_downloads_left_goes_once_the_model_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = tmp_path / "models--a--b"
    snapshot, blobs, locks = (
        repo / "snapshots" / "c",
        repo / "blobs",
        tmp_path / ".locks" / repo.name,
    )
    for folder in snapshot, blobs, locks:
        folder.mkdir(parents=True)
    for name in (
        "whole",
        "left.1a.incomplete",
        "left.2b.incomplete",
        "under-way.3c.incomplete",
        "tmp_1f",
    ):
        (blobs / name).touch()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(snapshot))
    with FileLock(locks / "under-way.lock"):
        assert invoke("models", "pull", "a/b").exit_code == 0
    assert {file.name for file in blobs.iterdir()} == {"whole", "under-way.3c.incomplete"}


def test_any_pair_is_asked_for_steps_and_a_box(checkpoint: Path, draft_checkpoint: Path) -> None:
    folders = {"draft": str(draft_checkpoint), "target": str(checkpoint)}
    solver = specguard.load(**folders, backend="cpu", max_tokens=4)
    assert solver.config.system_prompt == pairs.STEP_BY_STEP
    solution = solver.solve("What is 2?")
    assert solution.to_dict()["config"]["system_prompt"] == pairs.STEP_BY_STEP
    options = ["--draft", folders["draft"], "--target", folders["target"], "--max-tokens", "4"]
    for given in "", "Be brief.":
        result = invoke("solve", "What is 2?", *options, "--json", "--system-prompt", given)
        data = json.loads(result.stdout)
        assert data["config"]["system_prompt"] == given
        num_tokens = data["stats"]["num_prompt_tokens"]
        assert num_tokens < solution.stats.num_prompt_tokens
    # A third party's pair says what it wants, and nothing is nothing.
    assert configure(choose("tiny", "cpu")).system_prompt is None


def test_the_built_in_pair_has_no_use_for_a_system_prompt() -> None:
    for options in (), ("--models", "tiny"):
        result = invoke("solve", SHELLS, "--system-prompt", "Be brief.", *options)
        assert result.exit_code == 2
        assert "no use for a system prompt" in result.stderr
    assert configure(choose("tiny", "cpu"), system_prompt="").system_prompt == ""


def test_thinking_is_sampled_and_always_asked_of_models_that_always_think() -> None:
    qwen, r1 = choose("qwen3", "cpu"), choose("deepseek-r1", "cpu")
    plain = configure(qwen)
    assert (plain.thinking, plain.sampling, plain.rewrite_sampling) == (False, None, GREEDY)
    for config in configure(qwen, thinking=True), configure(r1):
        assert config.thinking
        assert config.step_sampling == config.rewrite_sampling == THINKING_SAMPLING
    assert configure(qwen, thinking=True, sampling=GREEDY).step_sampling == GREEDY
    assert not configure(r1, thinking=False).thinking


def test_one_half_of_the_sampling_may_be_given(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from specguard.cli.method_options import settings_from

    choice = choose(None, "cpu", str(checkpoint), str(checkpoint))
    given = {"method": "specguard", "temperature": 0.3}
    assert settings_from(given, choice)["sampling"] == Sampling(0.3, 1.0)
    thinking = settings_from({**given, "thinking": True}, choice)
    assert thinking["sampling"] == Sampling(0.3, 0.95)


def test_the_notice_stays_where_the_built_in_pair_was_chosen_before() -> None:
    choose_pair("tiny")
    assert choose(None, "cpu").is_fallback
    assert not choose("tiny", "cpu").is_fallback
