"""Fitted verifiers by name, each bound to the pair that it was fitted to."""

import hashlib
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import cattrs
import tomli_w

from specguard.backends.checkpoint import open_checkpoint
from specguard.core.config import Author, VerifierConfig
from specguard.core.errors import SpecguardError, UsageError
from specguard.files import write_atomically
from specguard.models.settings import settings_path

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SAMPLE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Profile:
    """A verifier, the fingerprints of its draft and target, and the figures of its fit."""

    name: str
    draft: str
    target: str
    verifier: VerifierConfig
    figures: dict[str, float] = field(default_factory=dict)

    def check(self, sources: Mapping[Author, str]) -> None:
        """Refuse another pair, before it is loaded.

        Raises:
            SpecguardError: a model is not the one that the profile was fitted to.
        """
        fitted: dict[Author, str] = {"draft": self.draft, "target": self.target}
        for role, known in fitted.items():
            source = sources.get(role)
            if source is not None and fingerprint(source) != known:
                raise SpecguardError(
                    f"profile {self.name!r} was fitted to another {role} than {source}",
                    "calibrate this pair: specguard calibrate",
                )


def profiles_folder() -> Path:
    """Where profiles are kept."""
    return settings_path().parent / "profiles"


def profile_path(name: str) -> Path:
    """The file of a profile.

    Raises:
        UsageError: a name that is no plain file name.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} is no name for a profile", "letters, digits, dots and dashes")
    return profiles_folder() / f"{name}.toml"


def save_profile(profile: Profile) -> Path:
    """Keep a profile; one of the same name is replaced in one go.

    Raises:
        SpecguardError: it cannot be written.
    """
    path = profile_path(profile.name)
    data = asdict(profile)
    data["verifier"]["bounds"] = {n: list(b) for n, b in profile.verifier.bounds.items()}
    data["verifier"]["weights"] = dict(profile.verifier.weights)
    try:
        write_atomically(path, tomli_w.dumps(data).encode())
    except OSError as error:
        raise SpecguardError(f"{path} cannot be written: {error.strerror}") from error
    return path


def find_profile(name: str) -> Profile:
    """The profile called ``name``.

    Raises:
        UsageError: there is none.
        SpecguardError: its file cannot be read.
    """
    path = profile_path(name)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        return _converter.structure(data, Profile)
    except FileNotFoundError as error:
        known = ", ".join(sorted(file.stem for file in path.parent.glob("*.toml"))) or "none yet"
        raise UsageError(f"no profile is called {name!r}", f"profiles: {known}") from error
    except Exception as error:
        raise SpecguardError(
            f"the profile {path} cannot be read: {error}", "calibrate anew or mend the file"
        ) from error


def fingerprint(source: str) -> str:
    """A short digest of a checkpoint: its shape, and samples of its weights."""
    checkpoint = open_checkpoint(source)
    digest = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode())
    for path in sorted(checkpoint.folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(str(size).encode())
        with path.open("rb") as file:
            for place in 0, size // 2, max(0, size - _SAMPLE_BYTES):
                file.seek(place)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def _verifier(data: Any, _: type) -> VerifierConfig:
    bounds = {name: (float(low), float(high)) for name, (low, high) in data["bounds"].items()}
    return VerifierConfig(**{**data, "bounds": bounds})


_converter = cattrs.Converter()
_converter.register_structure_hook(VerifierConfig, _verifier)
