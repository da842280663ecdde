"""What is built: the package list, the wheel's content, the symlinks of a checkout."""

import ast
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
SIBLINGS = ("backends", "cli", "models")
# In the checkout alone: how the pair was made, what was measured, and the tests.
NOT_INSTALLED = {"recipes", "benchmarks", "tests"}


def folders_with_code() -> set[str]:
    """Package names of all folders that hold an __init__.py, seen through the symlinks."""
    found = set()
    for top in ("specguard", *SIBLINGS):
        for file in (ROOT / top).rglob("__init__.py"):
            parts = file.parent.relative_to(ROOT).parts
            if parts[0] == "specguard" and len(parts) > 1 and parts[1] in SIBLINGS:
                continue
            found.add(".".join(parts if parts[0] == "specguard" else ("specguard", *parts)))
    return found


def source_files() -> list[tuple[str, Path]]:
    """Package and file of every module."""
    return [
        (package, file)
        for package in sorted(folders_with_code())
        for file in (ROOT / package.replace(".", "/")).glob("*.py")
    ]


def listed_packages() -> set[str]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        return set(tomllib.load(file)["tool"]["setuptools"]["packages"])


def test_every_folder_with_code_is_listed() -> None:
    assert listed_packages() == folders_with_code()


def imported_names(file: Path) -> set[str]:
    """Top-level names of everything that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def test_the_package_imports_nothing_of_the_checkout_alone() -> None:
    for _, file in source_files():
        assert not imported_names(file) & NOT_INSTALLED, file


@pytest.mark.skipif(sys.platform == "win32", reason="a development checkout needs symlinks")
def test_the_siblings_are_linked() -> None:
    for name in SIBLINGS:
        link = ROOT / "specguard" / name
        assert link.is_symlink()
        assert link.readlink() == Path("..") / name


@pytest.mark.parametrize(
    ("environment", "brought", "left_out"),
    [
        ({"sys_platform": "darwin", "platform_machine": "arm64"}, {"mlx", "mlx-lm"}, {"torch"}),
        ({"sys_platform": "linux", "platform_machine": "x86_64"}, {"torch"}, {"mlx", "mlx-lm"}),
        ({"sys_platform": "win32", "platform_machine": "AMD64"}, {"torch"}, {"mlx", "mlx-lm"}),
    ],
)
def test_a_plain_install_brings_what_suits_the_platform(
    environment: dict[str, str], brought: set[str], left_out: set[str]
) -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        lines = tomllib.load(file)["project"]["dependencies"]
    requirements = map(Requirement, lines)
    names = {
        requirement.name
        for requirement in requirements
        if requirement.marker is None or requirement.marker.evaluate(environment)
    }
    assert brought <= names
    assert not left_out & names


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_the_built_in_pair(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    [wheel] = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {f"{name.replace('.', '/')}/{file.name}" for name, file in source_files()}
    assert {name for name in names if name.endswith(".py")} == modules
    [metadata] = {name.split("/")[0] for name in names} - {"specguard"}
    assert metadata.endswith(".dist-info")
    assert "specguard/py.typed" in names
    assert "specguard/models/tiny/language.json" in names
    assert {"specguard/serve/page.html.jinja", "specguard/serve/page.js"} <= names
    for profile in (ROOT / "models" / "fitted").glob("*.json"):
        assert f"specguard/models/fitted/{profile.name}" in names
    for role in "draft", "target", "reward":
        for file in "config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja":
            assert f"specguard/models/tiny/{role}/{file}" in names
