"""GGUF files before any weight is read: where they are found, and what is wrong with one."""

import struct
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specguard import loading
from specguard.backends.checkpoint import (
    is_gguf,
    is_hub_id,
    is_on_disk,
    open_checkpoint,
    open_model,
    read_gguf,
)
from specguard.backends.registry import backend_for
from specguard.core import SpecguardError, UsageError
from specguard.models.profiles import fingerprint
from tests.conftest import TINY
from tests.test_cli import invoke

USUAL: Mapping[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 3,
    "llama.context_length": 100,
    "llama.embedding_length": 32,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
}


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def packed(value: Any) -> bytes:
    """A value with its type in front."""
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    if isinstance(value, list) and isinstance(value[0], str):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
    if isinstance(value, list):
        return struct.pack("<IIQ", 9, 4, len(value)) + struct.pack(f"<{len(value)}I", *value)
    return struct.pack("<II", 4, value)


def content(config: Mapping[str, Any] = USUAL, offset: int = 0) -> bytes:
    """A file with one tensor [32, 7] in float32."""
    entries = b"".join(text(name) + packed(value) for name, value in config.items())
    tensor = text("token_embd.weight") + struct.pack("<IQQIQ", 2, 32, 7, 0, offset)
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, len(config))
    return head + entries + tensor + bytes(32 * 7 * 4)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(content())
    return path


def test_what_a_file_says(file: Path) -> None:
    lists = {
        "tokenizer.ggml.tokens": ["a", "bc", ""] * 3,
        "llama.attention.head_count_kv": [2, 0, 1],
    }
    file.write_bytes(content({**USUAL, **lists}))
    model = read_gguf(str(file))
    assert (model.architecture, model.context_limit, model.num_parameters) == ("llama", 100, 224)
    assert model.num_bytes == file.stat().st_size
    assert model.num_cached_numbers == 2 * 3 * 8  # heads of all layers, 8 wide, keys and values
    assert "tokenizer.ggml.tokens" not in model.config
    assert open_model(str(file)).num_bytes == model.num_bytes


@pytest.mark.parametrize(
    ("damaged", "reason"),
    [
        (b"", "it is empty"),
        (b"PK" + content()[2:], "it does not begin as one"),
        (b"GGUF" + struct.pack("<I", 9) + content()[8:], "its version is 9"),
        (content()[:8] + struct.pack("<Q", 2**60) + content()[16:], "would have .* tensors"),
        (content()[:16] + struct.pack("<Q", 2**40) + content()[24:], "would have .* metadata"),
        (content()[:60], "it ends too early"),
        (content(offset=10**6), "it ends too early"),
        (content({**USUAL, "llama.block_count": 10**6}), "llama.block_count is 1000000"),
        (content({**USUAL, "llama.context_length": 0}), "llama.context_length is 0"),
        (content({**USUAL, "llama.attention.head_count": 2**31}), "head_count is 2147483648"),
        (content({**USUAL, "llama.embedding_length": "many"}), "embedding_length is 'many'"),
        (content({"general.architecture": "llama"}), "llama.block_count is None"),
        (content({"llama.block_count": 3}), "does not say which architecture"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_one_error(file: Path, damaged: bytes, reason: str) -> None:
    file.write_bytes(damaged)
    with pytest.raises(SpecguardError, match=f"model.gguf is no GGUF file .*{reason}") as caught:
        read_gguf(str(file))
    assert caught.value.hint


@given(data=st.data())
def test_no_damage_is_anything_but_an_error(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = bytearray(content({**USUAL, "tokenizer.ggml.tokens": ["a", "bc"]}))
    for place in data.draw(st.lists(st.integers(0, 400), max_size=4)):
        whole[place] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.mktemp("damaged") / "model.gguf"
    file.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    with suppress(SpecguardError):
        read_gguf(str(file))


def test_a_folder_leads_to_its_file(file: Path) -> None:
    folder = file.parent
    assert read_gguf(str(folder)).path == file
    (folder / "mmproj-model.gguf").write_bytes(b"")
    assert read_gguf(str(folder)).path == file
    (folder / "other.gguf").write_bytes(content())
    with pytest.raises(UsageError, match=r"has several GGUF files: model.gguf, other.gguf"):
        is_gguf(str(folder))
    (folder / "config.json").write_text("{}")
    assert not is_gguf(str(folder))  # a folder of safetensors beside which somebody keeps files


def test_a_downloaded_hub_repo_leads_to_its_file(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants as constants

    cache, commit = tmp_path / "hub" / "models--owner--name", "0" * 40
    (cache / "snapshots" / commit).mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    file.rename(cache / "snapshots" / commit / "model.gguf")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert is_on_disk("owner/name")
    assert backend_for("owner/name", "auto") == "llamacpp"
    assert read_gguf("owner/name").name == "owner/name"
    assert backend_for("owner/another", "auto") == "auto"


def test_parts_belong_together(tmp_path: Path) -> None:
    parts = [tmp_path / f"model-{number:05}-of-00002.gguf" for number in (1, 2)]
    parts[0].write_bytes(content())
    with pytest.raises(SpecguardError, match=r"lacks its part model-00002-of-00002.gguf"):
        read_gguf(str(tmp_path))
    parts[1].write_bytes(content())
    model = read_gguf(str(tmp_path))
    assert model.weight_files == tuple(parts)
    assert model.num_bytes == 2 * parts[0].stat().st_size


def test_a_path_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id("models/model.gguf")
    assert is_gguf("models/model.gguf")
    assert not is_on_disk("models/model.gguf")
    with pytest.raises(SpecguardError, match=r"there is no GGUF file 'models/model.gguf'"):
        read_gguf("models/model.gguf")
    assert not is_gguf("owner/name")


def test_a_file_chooses_the_backend(file: Path) -> None:
    assert backend_for(str(file), "auto") == "llamacpp"
    assert backend_for(str(file), "llamacpp") == "llamacpp"
    assert backend_for(str(TINY / "target"), "auto") == "auto"
    assert backend_for(None, "cpu") == "cpu"
    with pytest.raises(UsageError, match="a GGUF file, which the backend 'cpu' does not read"):
        backend_for(str(file), "cpu")
    with pytest.raises(SpecguardError, match="is a GGUF file") as caught:
        open_checkpoint(str(file))
    assert "--backend llamacpp" in caught.value.hint


def test_each_role_has_its_own_backend(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "choose_backend", lambda name: (name, FakeBackend(), None))
    choice = loading.choose(None, "auto", str(TINY / "draft"), str(file))
    assert choice.backends == {"draft": "auto", "target": "llamacpp"}


class FakeBackend:
    weights = "torch"


def test_what_is_known_of_a_file_follows_its_content(file: Path) -> None:
    before = fingerprint(str(file))
    assert before == fingerprint(str(file.parent))
    file.write_bytes(content({**USUAL, "general.name": "other"}))
    assert fingerprint(str(file)) != before


def test_a_wrong_file_is_one_line_on_the_command_line(file: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: .ci/engines")
    file.write_bytes(content()[:100])
    result = invoke("solve", "What?", "--target", str(file), "--method", "target")
    assert result.exit_code == 1
    assert result.stdout == ""
    [line, hint] = result.stderr.strip().splitlines()
    assert "it ends too early" in line
    assert "download" in hint
