"""Writes, makes durable and removes checkpoint files in an open directory. fields.py defines their content.

Most of this runs in the checkpoint writer (writer.py), a small process, so it imports only a few modules of the
standard library. Every function may raise OSError, and may hang with the disk.

    center-00000000000000000012.fresh.safetensors       written in this boot of this machine
    center-00000000000000000012.5f3a9c1b.safetensors    on the disk, whose CRC-32 is 5f3a9c1b
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import zlib
from collections.abc import Iterable, Iterator

__all__ = [
    "FRESH",
    "find_again",
    "fresh_name",
    "make_durable",
    "newest_first",
    "open_directory",
    "open_regular",
    "parse_name",
    "prune",
    "put_in_place",
    "remove",
    "remove_unfinished",
    "take_lock",
    "write",
]

FRESH = "fresh"
_PREFIX, _SUFFIX, _UNFINISHED = "center-", "safetensors", ".tmp"
_STEP_DIGITS, _CHECKSUM_DIGITS = 20, 8
_LOCK = "lock"
_BLOCK_BYTES = 1 << 20
# Does not follow links, and does not block on a FIFO or a device.
_SAFELY = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_KINDS = {
    stat.S_IFLNK: "a link",
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


# Names.


def fresh_name(global_step: int) -> str:
    """The name of a checkpoint that is not durable yet."""
    return f"{_PREFIX}{global_step:0{_STEP_DIGITS}d}.{FRESH}.{_SUFFIX}"


def parse_name(name: str) -> tuple[int, str] | None:
    """The `global_step` in a checkpoint's name, and its checksum or FRESH; None: not a checkpoint's name."""
    stem, _, rest = name.partition(".")
    kind, _, suffix = rest.partition(".")
    digits = stem[len(_PREFIX) :]
    if not stem.startswith(_PREFIX) or suffix != _SUFFIX or len(digits) != _STEP_DIGITS:
        return None
    is_checksum = len(kind) == _CHECKSUM_DIGITS and not kind.strip("0123456789abcdef")
    if not (digits.isascii() and digits.isdigit()) or not (kind == FRESH or is_checksum):
        return None
    return int(digits), kind


def newest_first(directory: int) -> list[str]:
    """The names of all checkpoints, whatever their file type, latest first. Of the same step, the fresh one comes
    first: it was written later, when a worker finished between two rounds."""
    found = [(parsed, name) for name in os.listdir(directory) if (parsed := parse_name(name)) is not None]
    return [name for _, name in sorted(found, key=lambda one: (-one[0][0], one[0][1] != FRESH, one[1]))]


# Directories.


def open_directory(path: str | bytes | os.PathLike[str]) -> int:
    """A descriptor of the directory."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def take_lock(directory: int) -> int:
    """A descriptor that locks the directory against other servers while it is open. Raises BlockingIOError if another
    server holds the lock."""
    try:
        lock = os.open(_LOCK, os.O_RDONLY | _SAFELY, dir_fd=directory)
    except FileNotFoundError:
        lock = os.open(_LOCK, os.O_RDONLY | os.O_CREAT | _SAFELY, 0o600, dir_fd=directory)
    try:
        _check_regular(os.fstat(lock), _LOCK)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(lock)
        raise
    return lock


def find_again(path: bytes, held: int) -> tuple[int, int] | None:
    """Checks that the path still leads to the open directory; if the directory was removed, creates it again.

    Returns:
        None if nothing has changed; otherwise descriptors of the new directory and of its lock.

    Raises:
        OSError: the path leads elsewhere or nowhere although the open directory was not removed (its disk may have been
            unmounted); something else is in its place; or the directory cannot be created.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        found = None
    try:
        was = os.fstat(held)
        removed = was.st_nlink == 0
    except OSError as error:
        if error.errno != errno.ESTALE:  # NFS reports this if another machine has removed the directory
            raise
        removed = True
    else:
        if found is not None and os.path.samestat(found, was):
            return None
    if not removed:
        what = "is gone" if found is None else "is another directory"
        raise OSError(errno.ESTALE, f"it {what}: the one that the server began with was moved, or its disk unmounted")
    if found is None:
        os.makedirs(path, 0o700)
    directory = open_directory(path)
    try:
        if newest_first(directory):
            raise OSError(errno.ESTALE, "it was removed, and another directory with checkpoints has taken its place")
        return directory, take_lock(directory)
    except BlockingIOError:
        os.close(directory)
        raise OSError(errno.EBUSY, "it was removed, and another server has taken its place") from None
    except BaseException:
        os.close(directory)
        raise


# Files.


def open_regular(directory: int, name: str) -> int:
    """A descriptor to read a regular file. Opens no other kind of file, and does not block."""
    # Checked before opening, because opening a device can have side effects.
    _check_regular(os.stat(name, dir_fd=directory, follow_symlinks=False), "it")
    descriptor = os.open(name, os.O_RDONLY | _SAFELY, dir_fd=directory)
    try:
        _check_regular(os.fstat(descriptor), "it")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def write(directory: int, name: str, chunks: Iterable[bytes | memoryview]) -> None:
    """Writes a file under a temporary name, readable by this user only, and renames it when it is complete."""
    # An unguessable name, so that no file can be planted under it.
    beside = f"{name.rpartition('.')[0]}.{os.urandom(8).hex()}{_UNFINISHED}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(beside, flags, 0o600, dir_fd=directory)
    try:
        with open(descriptor, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
        with _naming_alone(directory):
            put_in_place(directory, beside, name)
    except BaseException:
        remove(directory, beside)
        raise


def put_in_place(directory: int, beside: str, name: str) -> None:
    """Renames a complete file, replacing any file of that name."""
    os.rename(beside, name, src_dir_fd=directory, dst_dir_fd=directory)


def make_durable(directory: int, fresh: str) -> str | None:
    """Flushes a fresh checkpoint to the disk and renames it to its durable name, which is returned.

    Returns None in two cases. It was already made durable, replacing another one of its step. Or another checkpoint has
    replaced it meanwhile, and that one stays fresh until this is called again."""
    try:
        descriptor = open_regular(directory, fresh)
    except FileNotFoundError:
        if _is_durable(directory, fresh):
            return None
        raise
    try:
        os.fsync(descriptor)
        durable = fresh.replace(f".{FRESH}.", f".{_checksum(descriptor):0{_CHECKSUM_DIGITS}x}.")
        with _naming_alone(directory):
            now = os.stat(fresh, dir_fd=directory, follow_symlinks=False)
            if not os.path.samestat(now, os.fstat(descriptor)):
                return None
            put_in_place(directory, fresh, durable)
    finally:
        os.close(descriptor)
    os.fsync(directory)
    return durable


def _is_durable(directory: int, fresh: str) -> bool:
    """Whether a durable checkpoint of the same step exists."""
    wanted = parse_name(fresh)
    found = map(parse_name, newest_first(directory))
    return any(wanted and each and each[0] == wanted[0] and each[1] != FRESH for each in found)


@contextlib.contextmanager
def _naming_alone(directory: int) -> Iterator[None]:
    """Lets only one process at a time rename files here, so that a name cannot change its file between a check and the
    rename."""
    lock = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def prune(directory: int, newest: str, keep: int) -> None:
    """Removes the checkpoints that ``newest``, just made durable, replaces: earlier fresh ones, and durable ones except
    the ``keep`` - 1 before it. Checkpoints of later steps stay and do not count: the server that wrote ``newest`` could
    not use them.
    """
    parsed = parse_name(newest)
    assert parsed is not None
    step, durable_before = parsed[0], 0
    for name in newest_first(directory):
        parsed = parse_name(name)
        assert parsed is not None
        its_step, kind = parsed
        if its_step > step or name == newest or not _is_regular(directory, name):
            continue
        if kind == FRESH:
            is_left_behind = its_step < step
        else:
            durable_before += its_step < step
            is_left_behind = its_step == step or durable_before >= keep
        if is_left_behind:
            remove(directory, name)


def remove(directory: int, name: str) -> None:
    """Removes a file if possible."""
    with contextlib.suppress(OSError):
        os.unlink(name, dir_fd=directory)


def remove_unfinished(directory: int) -> None:
    """Removes unfinished files of killed writers. Must be called before anything is written there."""
    for name in os.listdir(directory):
        if name.startswith(_PREFIX) and name.endswith(_UNFINISHED):
            remove(directory, name)


def _is_regular(directory: int, name: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False


def _check_regular(found: os.stat_result, what: str) -> None:
    kind = stat.S_IFMT(found.st_mode)
    if kind != stat.S_IFREG:
        raise OSError(errno.EINVAL, f"{what} is {_KINDS.get(kind, 'something')}, not a regular file")


def _checksum(descriptor: int) -> int:
    value = 0
    while block := os.read(descriptor, _BLOCK_BYTES):
        value = zlib.crc32(block, value)
    return value
