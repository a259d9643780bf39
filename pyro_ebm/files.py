"""Files written whole or not at all: the one way in which the library writes."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pyro_ebm.checks import file_path

__all__ = ["replacing", "require_writable", "write_whole"]

_REMEDY = "choose a file in a folder that can be written and has space left"
# Names that Windows lacks.
_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; what is there takes its place when the block ends, and only then.

    Whatever goes wrong, an older file stays as it was and nothing half written is left, also where other processes or
    threads write the same file: the last to finish has it. What was written lies on the disk before it has the name.
    The permissions of an older file are kept, a link is followed to its target, folders that are missing are made.
    The name beside it cannot be guessed and is that of no other file; it has the ending of ``path``.

    Args:
        path: of a regular file, there or not.

    Raises:
        OSError: it cannot be written, with the path and what to do; also a folder, a device, a pipe or a socket, in
            whose place no file is put.
    """
    given = file_path("path", path)
    try:
        target = _target(given)
        temporary = _made_beside(target)
    except OSError as error:
        raise _refusal(given, error) from error
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
        _sync_folder(target.parent)
    except OSError as error:
        raise _refusal(given, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: str | Path, content: str | bytes | memoryview) -> None:
    """Write text (UTF-8, line ends as they are) or bytes by way of :func:`replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def require_writable(path: str | Path) -> None:
    """Find out before hours of work whether a file can be written there later.

    Raises:
        OSError: it cannot.
    """
    given = file_path("path", path)
    try:
        _made_beside(_target(given)).unlink()
    except OSError as error:
        raise _refusal(given, error) from error


def _target(path: Path) -> Path:
    """Where a path leads, links followed; its folder is made. An OSError of what is no regular file."""
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        mode = target.lstat().st_mode
    except FileNotFoundError:
        return target
    if stat.S_ISDIR(mode):
        raise IsADirectoryError("it is a folder")
    if not stat.S_ISREG(mode):
        raise OSError("it is a device, a pipe, a socket or a link to itself, and no file can take its place")
    if not os.access(target, os.W_OK):
        raise PermissionError("the file is read-only")
    return target


def _made_beside(target: Path) -> Path:
    """A new and empty file in the target's folder, with the permissions and the owner of the target."""
    ending = target.suffix if len(target.suffix) < 20 else ""
    temporary = target.with_name(f".pyro_ebm-{secrets.token_hex(12)}{ending}")
    old = target.stat() if target.exists() else None
    # Nobody else can read it before it has the permissions of what it replaces.
    descriptor = os.open(temporary, _CREATE, 0o666 if old is None else 0o600)
    try:
        if old is not None and hasattr(os, "fchown"):
            with suppress(PermissionError):
                os.fchown(descriptor, old.st_uid, old.st_gid)
            os.fchmod(descriptor, stat.S_IMODE(old.st_mode))
    finally:
        os.close(descriptor)
    return temporary


def _sync_folder(folder: Path) -> None:
    """The name on the disk too, where the system can do that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _refusal(path: Path, error: OSError) -> OSError:
    """The same kind of error, with the path that was given and the remedy."""
    text = f"cannot write {path}: {error.strerror or error}; {_REMEDY}"
    return OSError(error.errno, text) if error.errno is not None else type(error)(text)
