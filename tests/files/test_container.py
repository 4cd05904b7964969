"""Files of the library appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from plasticnet import PlasticError, load_checkpoint, save_checkpoint


def refuse(error: BaseException) -> Any:
    def stop(*args: Any, **options: Any) -> None:
        raise error

    return stop


@pytest.mark.parametrize(
    ("error", "seen"),
    [(OSError(28, "No space left on device"), PlasticError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
@pytest.mark.parametrize("name", ["write_bytes", "replace"])
def test_what_cannot_be_written_leaves_the_file_before_it(
    name: str, error: BaseException, seen: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint({"a": torch.arange(3)}, tmp_path / "run")
    monkeypatch.setattr(Path if name == "write_bytes" else os, name, refuse(error))
    with pytest.raises(seen):
        save_checkpoint({"a": torch.arange(4)}, tmp_path / "run")
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert torch.equal(load_checkpoint(tmp_path / "run")["a"], torch.arange(3))


def test_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file" / "run", tmp_path / "gone" / "run", tmp_path):
        with pytest.raises(PlasticError, match="cannot be written"):
            save_checkpoint([1], path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
