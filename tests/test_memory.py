"""Whether models fit: counted together, with keys and values, against what a process may have."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import specguard
from specguard import loading
from specguard.backends import memory
from specguard.backends.checkpoint import open_checkpoint
from specguard.backends.memory import Demand, Place, check_memory, this_machine
from specguard.backends.pytorch.backend import CUDA
from specguard.backends.registry import BackendStatus, MeasuredBackend, choose_backend
from specguard.core import SpecguardError
from tests.conftest import TINY, make_checkpoint
from tests.test_cli import invoke

GIB = 2**30
HERE = Place("this machine", 8 * GIB)


def demand(model: str, place: Place = HERE, gib: float = 5.0, per_token: int = 0) -> Demand:
    return Demand(model, place, round(gib * GIB), per_token)


def test_models_are_counted_together() -> None:
    for model in "small", "large":
        check_memory([demand(model)], 100)
    with pytest.raises(SpecguardError, match=r"small and large need 10\.0 GiB") as caught:
        check_memory([demand("small"), demand("large")], 100)
    assert "this machine has 8.0 GiB free" in caught.value.message
    assert "--dtype bfloat16" in caught.value.hint


def test_keys_and_values_need_room_beside_the_weights() -> None:
    models = [demand("small", gib=1, per_token=2**20), demand("large", gib=5, per_token=3 * 2**20)]
    check_memory(models, 512)
    with pytest.raises(SpecguardError, match=r"need 8\.0 GiB \(2\.0 of it for keys and values\)"):
        check_memory(models, 513)


def test_each_place_holds_its_own_models() -> None:
    gpu = Place("GPU cuda:1", 4 * GIB)
    check_memory([demand("draft", gpu, gib=3), demand("target", gib=7)], 100)
    with pytest.raises(SpecguardError, match=r"^draft needs .* and GPU cuda:1 has 4\.0 GiB free"):
        check_memory([demand("draft", gpu), demand("target", gib=7)], 100)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine with 100 GiB free, and no control groups yet."""
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "_OWN_CGROUPS", tmp_path / "own")
    figures = SimpleNamespace(available=100 * GIB, total=100 * GIB)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: figures)
    return figures


def write_group(folder: Path, names: tuple[str, str], limit: object, used: int, stat: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in zip((*names, "memory.stat"), (limit, used, stat), strict=True):
        (folder / name).write_text(f"{content}\n")


VERSION_2 = ("memory.max", "memory.current")
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
Group = Callable[..., None]


@pytest.fixture(params=[2, 1])
def group(request: pytest.FixtureRequest, machine: SimpleNamespace, tmp_path: Path) -> Group:
    """Makes a control group of either version that this process is in."""
    cgroups = tmp_path / "cgroup"

    def make(path: str, limit: object, used: int, files: int = 0, is_own: bool = True) -> None:
        if request.param == 2:
            line = f"0::/{path}"
            stat = f"anon 1\nactive_file {files}\ninactive_file 0"
            write_group(cgroups / path, VERSION_2, limit, used, stat)
        else:
            line = f"12:pids:/x\n4:cpu,memory:/{path}\n0::/elsewhere"
            stat = f"cache 1\nactive_file 7\ntotal_active_file 0\ntotal_inactive_file {files}"
            limit = 2**63 - 4096 if limit == "max" else limit
            write_group(cgroups / "memory" / path, VERSION_1, limit, used, stat)
        if is_own:
            (tmp_path / "own").write_text(line + "\n")

    return make


def test_the_limit_of_a_control_group_holds(group: Group) -> None:
    group("job", 6 * GIB, 2 * GIB)
    assert this_machine() == Place("this machine", 4 * GIB)


def test_the_narrowest_group_above_this_one_counts(group: Group) -> None:
    group("", "max", 90 * GIB, is_own=False)
    group("user", 10 * GIB, 9 * GIB, is_own=False)
    group("user/job", 6 * GIB, 2 * GIB)
    assert this_machine().num_free_bytes == 1 * GIB


def test_a_container_that_sees_the_path_outside_finds_its_limit_at_the_top(group: Group) -> None:
    group("", 3 * GIB, 1 * GIB)
    group("docker/0123", 9 * GIB, 0)
    own = memory._OWN_CGROUPS.read_text().replace("docker/0123", "docker/4567")
    memory._OWN_CGROUPS.write_text(own)
    assert this_machine().num_free_bytes == 2 * GIB


def test_files_that_the_kernel_keeps_in_memory_take_no_room(group: Group) -> None:
    group("job", 6 * GIB, 6 * GIB, files=5 * GIB)
    assert this_machine().num_free_bytes == 5 * GIB


def test_without_a_limit_the_machine_s_memory_counts(group: Group, tmp_path: Path) -> None:
    group("job", "max", 2 * GIB)
    assert this_machine().num_free_bytes == 100 * GIB
    (tmp_path / "own").unlink()
    assert this_machine().num_free_bytes == 100 * GIB


TINY_PAIR = [open_checkpoint(str(TINY / role)) for role in ("draft", "target")]
WEIGHTS = sum(4 * checkpoint.num_parameters for checkpoint in TINY_PAIR)
PER_TOKEN = sum(4 * checkpoint.num_cached_numbers for checkpoint in TINY_PAIR)


@pytest.mark.parametrize("backend", ["cpu", "mlx"])
def test_what_does_not_fit_is_refused_before_anything_is_loaded(
    backend: str, machine: SimpleNamespace
) -> None:
    if backend == "mlx":
        pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    # A prompt, a solution, and the candidates of a step beside them.
    num_tokens = 1024 + 500 + 3 * 40
    settings = {"max_tokens": 500, "num_candidates": 3, "max_step_tokens": 40}
    machine.available = WEIGHTS + num_tokens * PER_TOKEN
    assert specguard.load("tiny", backend=backend, **settings).target is not None
    for available in WEIGHTS + num_tokens * PER_TOKEN - 1, WEIGHTS, 0:
        machine.available = available
        with pytest.raises(SpecguardError, match=r"draft and .*target need .* for keys and values"):
            specguard.load("tiny", backend=backend, progress=pytest.fail, **settings)
    target = TINY_PAIR[1]  # a plain method asks for room for its own model
    machine.available = 4 * (target.num_parameters + (1024 + 500) * target.num_cached_numbers)
    assert specguard.load("tiny", backend=backend, method="target", **settings).draft is None
    result = invoke("solve", "x", "--force", "--backend", backend)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "fewer --max-tokens" in result.stderr


@pytest.mark.parametrize("name", ["cpu", "mlx"])
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Phi3"])
def test_what_a_token_will_take_is_what_it_takes(name: str, family: str, tmp_path: Path) -> None:
    if name == "mlx":
        pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    folder = str(make_checkpoint(tmp_path / family, family))
    _, backend, _ = choose_backend(name)
    assert isinstance(backend, MeasuredBackend)
    for dtype, size in ("float32", 4), ("bfloat16", 2):
        demand = backend.demand(folder, dtype, None)
        engine = backend.load(folder, dtype, False, None)
        assert demand.num_bytes_per_token == engine.num_bytes_per_token > 0
        assert demand.num_weight_bytes == size * open_checkpoint(folder).num_parameters


def test_the_reward_model_has_to_fit_beside_the_pair(machine: SimpleNamespace) -> None:
    reward = open_checkpoint(str(TINY / "reward"))
    machine.available = WEIGHTS + 5000 * PER_TOKEN
    specguard.load("tiny", backend="cpu")
    machine.available = WEIGHTS + 4 * reward.num_parameters
    with pytest.raises(SpecguardError, match=r"draft and .*target and .*reward need"):
        specguard.load("tiny", backend="cpu", method="rsd", progress=pytest.fail)
    machine.available = reward.num_parameters
    with pytest.raises(SpecguardError, match="reward needs"):
        loading.load_reward(None, str(TINY / "reward"), "cpu", progress=pytest.fail)


class Elsewhere:
    """A backend with a memory of its own; nothing may be loaded onto it."""

    weights = "torch"

    def status(self) -> BackendStatus:
        return BackendStatus("elsewhere", True)

    def demand(self, source: str, dtype: str, device: str | None) -> Demand:
        return Demand(Path(source).name, Place(f"GPU {device}", 1000), 600, 0)

    def load(self, *arguments: Any, **options: Any) -> Any:
        raise AssertionError("it was loaded")


def test_a_gpu_s_own_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    choose = loading.choose_backend

    def chosen(name: str) -> Any:
        return ("gpu", Elsewhere(), name) if name.startswith("gpu:") else choose(name)

    monkeypatch.setattr(loading, "choose_backend", chosen)
    with pytest.raises(SpecguardError, match=r"draft and target need .* and GPU gpu:0 has 0"):
        specguard.load("tiny", backend="gpu:0")
    # Each fits on a GPU of its own, where loading begins.
    with pytest.raises(AssertionError, match="it was loaded"):
        specguard.load("tiny", backend="gpu:0", draft_backend="gpu:1")


def test_a_gpu_is_one_place_whatever_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    free = [5000, 7000]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (free[gpu.index or 0], 9000))
    source = str(TINY / "target")
    demands = [CUDA.demand(source, "auto", device) for device in (None, "cuda:0", "cuda:1")]
    assert [demand.place for demand in demands] == [
        Place("GPU 0", 5000),
        Place("GPU 0", 5000),
        Place("GPU 1", 7000),
    ]
    assert demands[0].num_weight_bytes == 2 * TINY_PAIR[1].num_parameters
    with pytest.raises(SpecguardError, match="there is no GPU cuda:2: this machine has 2"):
        CUDA.demand(source, "auto", "cuda:2")
