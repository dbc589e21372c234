"""What a suite has measured so far, kept on the disk, so that a killed run goes on where it stopped."""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.serialization

from audiolm_jax import files

REQUEST = "request.json"


class Journal:
    """Items measured, each in a file of its own.

    Attributes:
      folder: of the items and of whatever else a suite wants to find again; gone once the suite is done.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder

    def once(self, key: str, measure: Callable[[], Any]) -> Any:
        """What `measure` returned when this was first asked for `key`, in this run or in one that was stopped.

        Args:
          key: of the item, one of a kind in its suite.
          measure: gives None, truth values, numbers, text, NumPy arrays, and dicts and lists of them; a tuple comes
            back as a list.
        """
        item = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.msgpack"
        if not item.exists():
            files.write_bytes(item, flax.serialization.msgpack_serialize(measure()))
        return flax.serialization.msgpack_restore(item.read_bytes())

    def is_empty(self) -> bool:
        """Whether nothing was measured yet."""
        return not any(self.folder.glob("*.msgpack"))


@contextlib.contextmanager
def kept_beside(output: str, request: Mapping[str, Any]) -> Iterator[Journal]:
    """A journal that is deleted on success, and otherwise left beside `output` for the same request to go on with.

    Args:
      output: where the results will be.
      request: all that they depend on, JSON's types; the journal of another request is thrown away.

    Raises:
      UserError: another process is at work on this output.
    """
    output_path = pathlib.Path(os.path.abspath(output))
    folder = files.make_folder(output_path.parent) / f".{output_path.name}.unfinished"
    folder.mkdir(exist_ok=True)
    with files.exclusive(folder / "lock", "another process is measuring for this output", output):
        description = json.dumps(request, sort_keys=True)
        if not (folder / REQUEST).exists() or (folder / REQUEST).read_text() != description:
            for left in folder.iterdir():
                if left.name != "lock":
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
            files.write_bytes(folder / REQUEST, description.encode())
        journal = Journal(folder)
        try:
            yield journal
        except BaseException:
            if journal.is_empty():
                shutil.rmtree(folder)
            raise
        shutil.rmtree(folder)
