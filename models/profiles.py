"""Fitted verifiers by name, each bound to the pair that it was fitted to.

The user's own lie in a folder beside the settings; a few are shipped with the pairs. Of the same
name, the user's is taken.
"""

import hashlib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import cattrs
import tomli_w

from specguard.backends.checkpoint import is_on_disk, open_model
from specguard.core.config import Author, VerifierConfig
from specguard.core.errors import SpecguardError, UsageError
from specguard.files import write_atomically
from specguard.models.pairs import PAIRS
from specguard.models.settings import settings_path

NO_PROFILE = "none"
_SHIPPED = Path(__file__).parent / "fitted"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SAMPLE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Profile:
    """A verifier, the fingerprints of its draft and target, and the figures of its fit.

    ``pair`` is the pair's name that it is shipped with, None for one of the user's;
    ``description`` says what it was fitted on.
    """

    name: str
    draft: str
    target: str
    verifier: VerifierConfig
    figures: dict[str, float] = field(default_factory=dict)
    description: str = ""
    pair: str | None = None

    def check(self, sources: Mapping[Author, str]) -> None:
        """Refuse another pair, before it is loaded.

        Raises:
            SpecguardError: a model is not the one that the profile was fitted to.
        """
        for role, source in sources.items():
            if not self.fits(role, source):
                raise SpecguardError(
                    f"profile {self.name!r} was fitted to another {role} than {source}",
                    "calibrate this pair: specguard calibrate",
                )

    def fits(self, role: Author, source: str) -> bool:
        """Whether it was fitted to this model: the same weights, or those of its pair."""
        pair = PAIRS.get(self.pair or "")
        if pair is not None:
            own = pair.draft if role == "draft" else pair.target
            if source in own.values():
                return True
        known = self.draft if role == "draft" else self.target
        return is_on_disk(source) and fingerprint(source) == known

    @property
    def note(self) -> str:
        """What is said where it is used without having been named."""
        origin = "your own" if self.pair is None else "shipped with this pair"
        fitted = f", fitted on {self.description}" if self.description else ""
        return f"verified by profile {self.name!r}, {origin}{fitted} (--profile none leaves it out)"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON and TOML, without those that say nothing."""
        data = asdict(self)
        data["verifier"]["bounds"] = {n: list(b) for n, b in self.verifier.bounds.items()}
        data["verifier"]["weights"] = dict(self.verifier.weights)
        return {name: value for name, value in data.items() if value not in (None, "", {})}


def profiles_folder() -> Path:
    """Where the user's profiles are kept."""
    return settings_path().parent / "profiles"


def profile_path(name: str) -> Path:
    """The file of one of the user's profiles.

    Raises:
        UsageError: a name that is no plain file name, or that means none.
    """
    if not _NAME.fullmatch(name) or name == NO_PROFILE:
        raise UsageError(
            f"{name!r} is no name for a profile",
            f"letters, digits, dots and dashes, and not {NO_PROFILE!r}",
        )
    return profiles_folder() / f"{name}.toml"


def save_profile(profile: Profile) -> Path:
    """Keep a profile; one of the same name is replaced in one go.

    Raises:
        SpecguardError: it cannot be written.
    """
    path = profile_path(profile.name)
    try:
        write_atomically(path, tomli_w.dumps(profile.to_dict()).encode(), make_folders=True)
    except OSError as error:
        raise SpecguardError(f"{path} cannot be written: {error.strerror}") from error
    return path


def find_profile(name: str) -> Profile:
    """The profile called ``name``: the user's, else the one that is shipped.

    Raises:
        UsageError: there is none.
        SpecguardError: its file cannot be read.
    """
    path = profile_path(name)
    for file in path, _SHIPPED / f"{name}.json":
        if file.is_file():
            return _read(file)
    known = ", ".join(profile_names()) or "none yet"
    raise UsageError(f"no profile is called {name!r}", f"profiles: {known}")


def profile_names() -> list[str]:
    """Names of all profiles, in order."""
    files = [*profiles_folder().glob("*.toml"), *_SHIPPED.glob("*.json")]
    return sorted({file.stem for file in files})


def choose_profile(name: str | None, draft: str | None, target: str | None) -> Profile | None:
    """The profile called ``name``; without a name one that fits both models, if there is one.

    The user's are tried before those that are shipped, the newest first.

    Raises:
        UsageError: no profile has this name.
        SpecguardError: its file cannot be read.
    """
    if name == NO_PROFILE:
        return None
    if name is not None:
        return find_profile(name)
    if draft is None or target is None:
        return None
    fitting = (
        profile
        for profile in _readable()
        if profile.fits("draft", draft) and profile.fits("target", target)
    )
    return next(fitting, None)


def _readable() -> Iterator[Profile]:
    own = sorted(profiles_folder().glob("*.toml"), key=lambda file: -file.stat().st_mtime)
    for file in (*own, *sorted(_SHIPPED.glob("*.json"))):
        try:
            yield _read(file)
        except SpecguardError:  # whoever names it learns of it
            continue


def _read(file: Path) -> Profile:
    try:
        content = file.read_text(encoding="utf-8")
        data = json.loads(content) if file.suffix == ".json" else tomllib.loads(content)
        return _converter.structure(data, Profile)
    except Exception as error:
        raise SpecguardError(
            f"the profile {file} cannot be read: {error}", "calibrate anew or mend the file"
        ) from error


def fingerprint(source: str) -> str:
    """A short digest of a checkpoint: its shape, and samples of its weights."""
    model = open_model(source)
    digest = hashlib.sha256(json.dumps(model.config, sort_keys=True).encode())
    for path in sorted(model.weight_files):
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
