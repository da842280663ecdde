"""Broken folders, each with its own message; none is half loaded."""

import json
import shutil
from pathlib import Path

import pytest

from specguard.backends.checkpoint import is_on_disk, open_checkpoint
from specguard.backends.pytorch.loading import load_model
from specguard.backends.tokenizer import FolderTokenizer
from specguard.core import SpecguardError, UsageError
from tests.conftest import TINY


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


def test_a_whole_folder_is_described(folder: Path) -> None:
    found = open_checkpoint(str(folder))
    assert found.model_type == "llama"
    assert 4 * found.num_parameters < (folder / "model.safetensors").stat().st_size
    assert found.num_parameters > 100_000
    assert is_on_disk(str(folder))


def test_what_is_no_folder_and_not_downloaded(tmp_path: Path) -> None:
    with pytest.raises(SpecguardError, match="no model folder"):
        open_checkpoint(str(tmp_path / "missing"))
    with pytest.raises(SpecguardError, match="neither a folder nor a model on this disk") as caught:
        open_checkpoint("nobody/nothing@main")
    assert caught.value.hint == "download it first: specguard models pull nobody/nothing@main"
    assert not is_on_disk("nobody/nothing")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, r"no config\.json"),
        ("config.json", b"{", "not valid JSON"),
        ("config.json", b"[]", "not a JSON object"),
        ("model.safetensors", None, r"no model\.safetensors"),
        ("model.safetensors", b"", "truncated or corrupt"),
        ("model.safetensors", b"\x08" + b"\0" * 7 + b"{notjson", "truncated or corrupt"),
        ("model.safetensors.index.json", b"{}", "no index of weights"),
        ("model.safetensors.index.json", b"[]", "not a JSON object"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": 1}}', "no index of weights"),
    ],
)
def test_missing_and_broken_files(
    folder: Path, name: str, content: bytes | None, message: str
) -> None:
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(SpecguardError, match=message):
        open_checkpoint(str(folder))


def test_truncated_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(SpecguardError, match="truncated or corrupt"):
        open_checkpoint(str(folder))


def test_missing_shards(folder: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SpecguardError, match="model-00001-of-00002"):
        open_checkpoint(str(folder))


def test_missing_tensors(folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    path = folder / "model.safetensors"
    kept = {name: value for name, value in load_file(path).items() if "layers.1." not in name}
    save_file(kept, path, metadata={"format": "pt"})
    with pytest.raises(SpecguardError, match=r"lack model\.layers\.1\.input_layernorm"):
        load_model(str(folder))


def test_broken_generation_settings(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(SpecguardError, match="not valid JSON"):
        load_model(str(folder))


def test_pickled_weights_are_not_read(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(SpecguardError, match="safetensors") as caught:
        load_model(str(folder))
    assert "safetensors" in caught.value.hint


def test_a_missing_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(SpecguardError, match="tokenizer"):
        load_model(str(folder))


def test_weights_of_another_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["hidden_size"] = 128
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SpecguardError, match="cannot be loaded"):
        load_model(str(folder))


def test_an_unknown_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "perceptron"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SpecguardError, match="perceptron"):
        load_model(str(folder))


def test_code_in_a_checkpoint_is_not_run(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    marker = folder / "ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    with pytest.raises(SpecguardError):
        load_model(str(folder))
    assert not marker.exists()


TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}{% endfor %}"
    "{% if enable_thinking %}<think>{% endif %}[assistant]"
)


def tokenizer_with(folder: Path, template: str | None) -> FolderTokenizer:
    (folder / "chat_template.jinja").unlink()
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return FolderTokenizer(folder)


def span(tokenizer: FolderTokenizer, problem: str, system: str | None = None) -> str:
    prompt = tokenizer.encode_prompt(problem, system, False)
    return tokenizer.decode(prompt.token_ids[slice(*prompt.problem_span)])


def test_the_span_is_the_problem(folder: Path) -> None:
    tokenizer = FolderTokenizer(folder)
    problem = "Mia has 2 shells. user \\frac{1}{2} é 火"
    assert span(tokenizer, f"  {problem}\n") == problem
    # The template and the system prompt may hold the problem's words.
    assert span(tokenizer, "s") == "s"
    assert tokenizer.encode_prompt("assistant", None, False).problem_span[0] == 3
    assert span(tokenizer, "user", "user user") == "user"
    prompt = tokenizer.encode_prompt("x", "Be brief.", False)
    assert "Be brief." in tokenizer.decode(prompt.token_ids)


def test_without_a_template_the_prompt_is_plain(folder: Path) -> None:
    tokenizer = tokenizer_with(folder, None)
    prompt = tokenizer.encode_prompt("What is 2?", None, False)
    assert tokenizer.decode(prompt.token_ids) == "What is 2?\n\n"
    # A token that the problem shares with what follows belongs to the problem.
    assert span(tokenizer, "What is 2?", "Be brief.").strip() == "What is 2?"


def test_thinking_is_off_unless_the_template_has_a_switch(folder: Path) -> None:
    tokenizer = tokenizer_with(folder, TEMPLATE)
    for thinking in False, True:
        prompt = tokenizer.encode_prompt("hi", None, thinking)
        assert ("<think>" in tokenizer.decode(prompt.token_ids)) == thinking
    with pytest.raises(UsageError, match="no switch for thinking"):
        FolderTokenizer(TINY / "target").encode_prompt("hi", None, True)


@pytest.mark.parametrize(
    "template",
    [
        "{% if messages[0].role == 'system' %}{{ raise_exception('No!') }}{% endif %}" + TEMPLATE,
        TEMPLATE.replace("for m in messages", "for m in messages if m.role == 'user'"),
    ],
    ids=["refused", "ignored"],
)
def test_a_system_prompt_without_a_place_stands_in_front_of_the_problem(
    folder: Path, template: str
) -> None:
    tokenizer = tokenizer_with(folder, template)
    text = tokenizer.decode(tokenizer.encode_prompt("hi", "Be brief.", False).token_ids)
    assert text == "[user]Be brief.\n\nhi[assistant]"
    assert span(tokenizer, "hi", "Be brief.") == "hi"
    assert "Be" not in tokenizer.decode(tokenizer.encode_prompt("hi", None, False).token_ids)


def test_a_template_that_refuses_any_prompt_is_said_to(folder: Path) -> None:
    tokenizer = tokenizer_with(folder, "{{ raise_exception('Not me!') }}")
    for system_prompt in None, "Be brief.":
        with pytest.raises(UsageError, match="refuses this prompt: Not me!"):
            tokenizer.encode_prompt("hi", system_prompt, False)


def test_a_model_that_always_thinks_may_be_asked_to(folder: Path) -> None:
    """Its template has no switch, and cuts the thinking out of earlier answers."""
    cutting = "{% if false %}{{ messages[0].content.split('</think>')[-1] }}{% endif %}"
    tokenizer = tokenizer_with(folder, cutting + "{{ messages[0].content }}<think>")
    for thinking in False, True:
        prompt = tokenizer.encode_prompt("hi", None, thinking)
        assert tokenizer.decode(prompt.token_ids) == "hi<think>"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "many"}, "hidden_size is 'many'"),
        ({"hidden_size": -4}, "hidden_size is -4"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"max_position_embeddings": "long"}, "max_position_embeddings is 'long'"),
        ({"text_config": {"hidden_size": []}}, r"hidden_size is \[\]"),
        ({"hidden_size": 65}, "hidden size .* multiple of the number of attention heads"),
        ({"rope_parameters": 3}, "rope_parameters"),
    ],
)
def test_a_bad_config_is_blamed_and_not_the_tokenizer(
    folder: Path, change: dict[str, object], message: str
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(SpecguardError, match=message) as caught:
        load_model(str(folder))
    assert "config.json" in caught.value.message
    assert "tokenizer" not in caught.value.message


def test_eos_ids_come_from_settings_and_tokenizer(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert FolderTokenizer(folder).eos_ids == {2, 7, 9}


def test_a_downloaded_hub_id_is_found_by_name_and_revision(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "hub" / "models--owner--name"
    shutil.copytree(checkpoint, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for source in "owner/name", f"owner/name@{commit}":
        assert is_on_disk(source)
        assert load_model(source).name == source
    assert not is_on_disk("owner/name@other")
