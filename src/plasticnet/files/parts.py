"""Writes the parts of a distributed checkpoint, so that a folder has the old one or the new one, whatever happens.

Torch writes over the parts of the checkpoint that is in the folder, and renames the list of parts in the end. A process
that dies in between leaves an old list of new parts. Here new parts have names of their own, and old ones go at last.
"""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from plasticnet.files.disk import bring_to_disk

_PARTS = "*.distcp"


class PartsWriter(FileSystemWriter):
    """A writer for torch's distributed checkpoint that leaves the old one whole until the new one is.

    Args:
        folder: The folder, which may hold a checkpoint, and other files, too.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        super().__init__(folder)
        self.fs = _Replacing()

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Give the parts names that no part in the folder has; one process does it for all."""
        mark, found = secrets.token_hex(4), []
        for plan in super().prepare_global_plan(plans):
            name: Any = plan.storage_data
            found.append(replace(plan, storage_data=type(name)(f"{name.prefix}{mark}_")))
        return found

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Put the list of parts in the place of the old one, and remove what it does not name; one process does it."""
        folder = Path(self.path)
        named = {result.storage_data.relative_path for each in results for result in each}
        bring_to_disk(folder)
        super().finish(metadata, results)
        bring_to_disk(folder)
        for part in folder.glob(_PARTS):
            if part.name not in named:
                with suppress(OSError):  # it is in nobody's way
                    part.unlink()


class _Replacing(FileSystem):
    """Renames over what has the name, so that it need not be removed before."""

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Give a file a name, which another one may have."""
        os.replace(path, new_path)

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        """Leave the old list of parts, which torch would remove before the new one is renamed."""
