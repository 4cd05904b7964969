"""Files appear whole or not at all, and what is no plain file is refused at once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import plasticnet.hub as pn_hub
from plasticnet import PlasticError, load, load_checkpoint, save, save_checkpoint
from plasticnet.files.disk import append_file, read_bytes, remove_partials, replace_file
from plasticnet.files.weights import load_weights

POSIX = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with a name here")


def build() -> nn.Module:
    return nn.Linear(3, 2)


READERS: dict[str, Callable[[Path], Any]] = {
    "load": lambda path: load(path, build),
    "load_checkpoint": load_checkpoint,
    "load_weights": lambda path: load_weights(build(), path),
    "read_bytes": read_bytes,
}


def refuse(error: BaseException) -> Any:
    def stop(*args: Any, **options: Any) -> None:
        raise error

    return stop


# -- reading ------------------------------------------------------------------------------------


@POSIX
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "device", "folder"])
def test_what_is_no_plain_file_is_refused(kind: str, reader: str, tmp_path: Path) -> None:
    """A reader of a pipe would wait for ever, and one of /dev/zero would never end."""
    path = tmp_path / "file.safetensors"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to a pipe":
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to(tmp_path / "pipe")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(PlasticError, match=re.escape(str(path))):
        READERS[reader](path)


@POSIX
@pytest.mark.parametrize("name", [pn_hub.WEIGHTS, pn_hub.CONFIG])
def test_a_pipe_in_a_folder_of_the_hub(name: str, tmp_path: Path) -> None:
    pn_hub.save_pretrained(build(), tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(PlasticError, match=name):
        pn_hub.from_pretrained(tmp_path, build)


def test_a_link_to_a_plain_file_is_followed(tmp_path: Path) -> None:
    save_checkpoint([1], tmp_path / "there")
    (tmp_path / "link").symlink_to("there")
    assert load_checkpoint(tmp_path / "link") == [1]


@pytest.mark.parametrize("length", [2**62, 2**40, 2**31, 0])
def test_an_absurd_header_takes_no_memory(length: int, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(length.to_bytes(8, "little") + b'{"a":1}')
    with pytest.raises(PlasticError, match="damaged"):
        load_checkpoint(tmp_path / "file")


# -- writing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "seen"),
    [(OSError(28, "No space left on device"), PlasticError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
@pytest.mark.parametrize("name", ["open", "fsync", "replace"])
def test_what_cannot_be_written_leaves_the_file_before_it(
    name: str, error: BaseException, seen: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint({"a": torch.arange(3)}, tmp_path / "run")
    monkeypatch.setattr(os, name, refuse(error))
    with pytest.raises(seen) as caught:
        save_checkpoint({"a": torch.arange(4)}, tmp_path / "run")
    monkeypatch.undo()
    if seen is PlasticError:
        assert "run cannot be written: No space left on device: make room" in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert torch.equal(load_checkpoint(tmp_path / "run")["a"], torch.arange(3))


FULL = """
import resource, signal, sys
from pathlib import Path
import torch, plasticnet as pn
from plasticnet.files.disk import append_file
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
for write in (
    lambda: pn.save_checkpoint(torch.zeros(1000), sys.argv[1]),
    lambda: pn.save(torch.nn.Linear(100, 10), sys.argv[1]),
    lambda: append_file(Path(sys.argv[1]).with_name("lines"), bytes(4000)),
):
    try:
        write()
    except pn.PlasticError as error:
        print(error)
"""


@POSIX
@pytest.mark.slow
def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """A limit on the size of files is what comes nearest to it."""
    save_checkpoint([1, 2], tmp_path / "file")
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "file")], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert all("cannot be written" in line and "make room on this disk" in line for line in lines)
    assert load_checkpoint(tmp_path / "file") == [1, 2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "lines"]


def test_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path, way_out in (
        (tmp_path / "file" / "run", "give another path"),
        (tmp_path / "gone" / "run", f"make the folder {tmp_path / 'gone'}"),
        (tmp_path, "remove it, or give another path"),
        (Path("/proc/version/run"), "give another path"),
    ):
        with pytest.raises(PlasticError, match=f"{re.escape(str(path))} cannot be written: .*{re.escape(way_out)}"):
            save_checkpoint([1], path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    save_checkpoint([1], tmp_path / "run")
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PlasticError, match="make its folder writable"):
            save_checkpoint([2], tmp_path / "run")
    finally:
        tmp_path.chmod(0o700)
    assert load_checkpoint(tmp_path / "run") == [1]


@POSIX
def test_a_pipe_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for write in (replace_file, append_file):
        with pytest.raises(PlasticError, match="cannot be written"):
            write(tmp_path / "pipe", b"lost")
    assert (tmp_path / "pipe").is_fifo()


def test_links_are_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run").symlink_to("mine")
    save_checkpoint([1], tmp_path / "run")
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "run").is_symlink()
    (tmp_path / "lines").symlink_to("mine")
    if hasattr(os, "O_NOFOLLOW"):
        with pytest.raises(PlasticError, match="cannot be written"):
            append_file(tmp_path / "lines", b"more")
    assert (tmp_path / "mine").read_text() == "mine"


def test_nobody_can_predict_the_name_under_which_a_file_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    replace = os.replace

    def watching(old: Path, new: Path) -> None:
        seen.append(Path(old).name)
        replace(old, new)

    monkeypatch.setattr(os, "replace", watching)
    for _ in range(2):
        replace_file(tmp_path / "run", b"1")
    assert len(set(seen)) == 2


def test_what_was_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    kept = ["run", "run.partial", ".run.partial", f".other.{'0' * 16}.partial", f".run.{'g' * 16}.partial"]
    for name in [*kept, f".run.{'0123456789abcdef'}.partial"]:
        (tmp_path / name).write_text("")
    remove_partials(tmp_path, {"run"})
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(kept)
    remove_partials(tmp_path / "gone", {"run"})


def test_a_file_has_the_rights_that_any_new_file_gets(tmp_path: Path) -> None:
    (tmp_path / "usual").write_text("")
    save(build(), tmp_path / "ours")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


# -- paths --------------------------------------------------------------------------------------

BOTH: dict[str, Callable[[Any], Any]] = {
    **READERS,
    "save": lambda path: save(build(), path),
    "save_checkpoint": lambda path: save_checkpoint({}, path),
    "replace_file": lambda path: replace_file(path, b""),
}


@pytest.mark.parametrize("call", BOTH)
@pytest.mark.parametrize("path", [None, 3, "a\0b", b"a\0b", "\ud800", ["a"], True])
def test_what_is_no_path_is_refused(path: Any, call: str) -> None:
    with pytest.raises(PlasticError, match="is no path of a file"):
        BOTH[call](path)


@pytest.mark.parametrize("name", [b"plain.safetensors", "\u00e9\U0001f600.safetensors".encode()])
def test_a_path_of_bytes_is_written_and_read(name: bytes, tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/" + name
    save_checkpoint({"a": 1}, path)
    assert load_checkpoint(path) == load_checkpoint(tmp_path / os.fsdecode(name)) == {"a": 1}
    save(build(), path)
    assert isinstance(load(path, build), nn.Linear)
    with pytest.raises(PlasticError, match="nowhere/file cannot be written"):
        save_checkpoint({}, os.fsencode(tmp_path) + b"/nowhere/file")
    with pytest.raises(PlasticError, match="save writes safetensors"):
        save(build(), b"small.pt")
