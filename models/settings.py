"""The user's settings: one TOML file in the platform's configuration folder."""

import os
import tomllib
from pathlib import Path

import platformdirs
import tomli_w

from specguard.core.errors import SpecguardError
from specguard.files import write_atomically

FOLDER_VARIABLE = "SPECGUARD_CONFIG_DIR"


def settings_path() -> Path:
    """Where the settings are; the variable SPECGUARD_CONFIG_DIR names another folder."""
    folder = os.environ.get(FOLDER_VARIABLE) or platformdirs.user_config_dir("specguard")
    return Path(folder) / "settings.toml"


def chosen_pair() -> str | None:
    """The pair that the user chose with ``specguard models use``.

    Raises:
        SpecguardError: the file cannot be read.
    """
    path = settings_path()
    try:
        name = tomllib.loads(path.read_text(encoding="utf-8")).get("pair")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise SpecguardError(
            f"the settings {path} cannot be read: {error}", "mend or delete the file"
        ) from error
    return str(name) if name is not None else None


def choose_pair(name: str) -> Path:
    """Remember a pair; the file is replaced in one go.

    Raises:
        SpecguardError: the file cannot be written.
    """
    path = settings_path()
    try:
        write_atomically(path, tomli_w.dumps({"pair": name}).encode(), make_folders=True)
    except OSError as error:
        raise SpecguardError(f"the settings {path} cannot be written: {error}") from error
    return path
