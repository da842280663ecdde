"""Files that are whole or not there at all; their places are checked before the work for them."""

import errno
import glob
import os
import platform
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

import psutil

from specguard.core.errors import SpecguardError

_NEW_FILE, _PERMISSIONS = 0o666, 0o777
_PREFIX = f".specguard.{platform.node()}."  # of files that are not whole yet; a process id follows


def check_output_file(path: Path) -> None:
    """Refuse a place where no file could be written; a link counts as what it leads to.

    Raises:
        SpecguardError: it is a folder, a device or a pipe, it or its folder may not be written to,
            or the folder is missing.
    """
    try:
        real = _followed(path)
        mode = _mode(real)
        if mode is not None and not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "a device or a pipe"
            raise SpecguardError(f"{path} is {kind}, not a file", "name a file to write to")
        _check_folder(path, real.parent)
        if mode is not None and not os.access(real, os.W_OK):
            raise SpecguardError(f"{path} may not be written to", "name another file")
    except OSError as error:
        raise cannot_write(path, error) from error


def check_output_folder(path: Path) -> None:
    """Refuse a place for a folder of results, which may be there already.

    Raises:
        SpecguardError: it is no folder, it may not be written to, or the one that it would be made
            in is missing.
    """
    try:
        real = _followed(path)
        mode = _mode(real)
        if mode is not None and not stat.S_ISDIR(mode):
            raise SpecguardError(f"{path} is no folder", "name another folder")
        _check_folder(path, real if mode is not None else real.parent)
    except OSError as error:
        raise cannot_write(path, error) from error


def check_input_file(path: Path) -> None:
    """Refuse to read all of what may never end, or has nothing to read.

    Raises:
        SpecguardError: it is a folder or a device, or is not there.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise SpecguardError(f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(mode) and not stat.S_ISFIFO(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a device"
        raise SpecguardError(f"{path} cannot be read: it is {kind}", "name a file")


def cannot_write(path: Path, error: OSError) -> SpecguardError:
    """What to raise where a file could not be written."""
    return SpecguardError(f"{path} cannot be written: {error.strerror}", "name another place")


def write_atomically(path: Path, content: bytes, *, make_folders: bool = False) -> None:
    """Write a file beside its place and move it there in one go; a link's file is replaced.

    Raises:
        OSError: it cannot be written; an older file at ``path`` is then as it was.
    """
    path = _followed(path)
    mode = _mode(path)
    if mode is not None and not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is no regular file")
    if make_folders:
        path.parent.mkdir(parents=True, exist_ok=True)
    _remove_left(path.parent)
    descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=f"{_PREFIX}{os.getpid()}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        # Temporary files are for their owner alone.
        Path(partial).chmod(_usual_permissions() if mode is None else mode & _PERMISSIONS)
        Path(partial).replace(path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def _remove_left(folder: Path) -> None:
    """What processes of this machine that were killed have left."""
    for partial in folder.glob(f"{glob.escape(_PREFIX)}*"):
        pid = partial.name.removeprefix(_PREFIX).partition(".")[0]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            with suppress(OSError):
                partial.unlink()


def _followed(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _mode(path: Path) -> int | None:
    """What is there, None for nothing."""
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        return None


def _check_folder(path: Path, folder: Path) -> None:
    if _mode(folder) is None:
        raise SpecguardError(
            f"{path} cannot be written: there is no folder {folder}", "make it first"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise SpecguardError(
            f"{path} cannot be written: {folder} is read-only", "name another place"
        )


def _usual_permissions() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return _NEW_FILE & ~umask
