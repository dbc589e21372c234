"""Writing files and folders so that nothing half-written is ever left under its final name.

Paths are local, or — a training workdir only — in a bucket (gs://, s3://), where an object appears whole or not at all.
"""

import contextlib
import hashlib
import os
import pathlib
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from typing import IO

import filelock
from etils import epath

from audiolm_jax.errors import UserError

# Buckets are reached through fsspec: TensorFlow, where it happens to be installed, is never loaded for them.
os.environ.setdefault("EPATH_USE_TF", "false")


def is_local(path: str | os.PathLike[str]) -> bool:
    """Whether a path is in a file system, not in a bucket."""
    return "://" not in os.fspath(path)


def absolute(path: epath.Path) -> epath.Path:
    """The path from the root, as checkpoints want it."""
    return path.resolve() if is_local(path) else path


def make_workdir(path: str | os.PathLike[str]) -> epath.Path:
    """Creates a training workdir, in a file system or a bucket, or raises a UserError that says why not."""
    if is_local(path):
        return epath.Path(make_folder(path))
    folder = epath.Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Every process of a run looks for itself.
        probe = folder / f".writable-{uuid.uuid4().hex}"
        probe.write_text("")
        probe.unlink()
    except ImportError as error:
        raise UserError(f"no access to this kind of storage ({error})", path, "install audiolm_jax[gcs]") from error
    except Exception as error:  # Whatever the storage's client raises.
        raise UserError(f"workdir not writable ({error})", path, "check the bucket and your credentials") from error
    return folder


def make_folder(path: str | os.PathLike[str]) -> pathlib.Path:
    """Creates a folder (and its parents) that can be written to, or raises a UserError that says why not."""
    folder = pathlib.Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise UserError(f"output folder not writable ({error.strerror})", path, "choose another folder") from error


@contextlib.contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yields a scratch path beside `path`; it becomes `path` on success and is deleted on failure."""
    path = pathlib.Path(path)
    scratch = make_folder(path.parent) / f".{path.name}.incomplete-{os.getpid()}"
    try:
        yield scratch
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike[str], data: bytes):
    """Writes a whole file (or object), or nothing."""
    if not is_local(path):
        epath.Path(path).write_bytes(data)
        return
    with new_file(path) as scratch:
        scratch.write_bytes(data)


def printable(name: str) -> str:
    """A file's name as text that can be written, even where it is not in the file system's encoding."""
    return name.encode(errors="backslashreplace").decode()


def below(folder: pathlib.Path, _above: frozenset[str] = frozenset()) -> Iterator[pathlib.Path]:
    """All files of a folder and its folders, links to folders included, but for those that lead back up."""
    real = os.path.realpath(folder)
    if real in _above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            # Only a link costs a look at what it leads to, which may be itself.
            if os.path.isdir(entry) if entry.is_symlink() else entry.is_dir():
                yield from below(folder / entry.name, _above | {real})
            else:
                yield folder / entry.name


def write_text(path: pathlib.Path, text: str):
    """Writes UTF-8 in any locale; a file's name that is not UTF-8 stands in it as the bytes that it is."""
    path.write_text(text, encoding="utf-8", errors="surrogateescape")


def sha256(path: str | os.PathLike[str]) -> str:
    """Checksum of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush_to_disk(file: IO):
    """Returns once everything written to an open file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def exclusive(lock: pathlib.Path, what: str, where: str | os.PathLike[str], wait: bool = False) -> Iterator[None]:
    """Holds a lock file that dies with its process; where another holds it, waits or raises UserError(what, where)."""
    try:
        held = filelock.FileLock(lock, timeout=-1 if wait else 0).acquire()
    except filelock.Timeout as error:
        raise UserError(what, where, "wait for it or choose another folder") from error
    with held:
        yield


def refuse_existing(path: str | os.PathLike[str]):
    """Raises a UserError where a result would overwrite another."""
    folder = pathlib.Path(path)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError("output already exists", path, "remove it or choose another --output")


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yields a scratch folder beside `path`; it becomes `path` on success and is deleted on failure.

    Raises:
      UserError: `path` already holds something, or its parent cannot be written to.
    """
    path = pathlib.Path(os.path.abspath(path))
    refuse_existing(path)
    scratch = make_folder(path.parent) / f".{path.name}.incomplete-{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir()
        yield scratch
        if path.is_dir():
            path.rmdir()
        os.replace(scratch, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
