"""Files of the library say what they are, and tell damage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from plasticnet import PlasticError, load, load_checkpoint, save, save_checkpoint
from plasticnet.files.container import FORMAT

WRITTEN = Path(__file__).parent / "written"  # a file of each kind and format, as the code of that format wrote it


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


READERS: dict[str, Callable[[Path], Any]] = {"module": lambda path: load(path, build), "checkpoint": load_checkpoint}


def test_there_is_a_file_of_each_format() -> None:
    names = {path.name for path in WRITTEN.iterdir()}
    assert names == {f"{kind}-{n}.safetensors" for kind in READERS for n in range(1, FORMAT + 1)}


@pytest.mark.parametrize("version", range(1, FORMAT + 1))
def test_files_of_all_formats_are_read(version: int) -> None:
    small = load(WRITTEN / f"module-{version}.safetensors", build)
    assert torch.equal(small.get_parameter("0.weight"), torch.arange(12.0).reshape(3, 4))
    assert torch.equal(small.get_parameter("2.weight"), torch.arange(6.0).reshape(2, 3))
    found = load_checkpoint(WRITTEN / f"checkpoint-{version}.safetensors")
    assert torch.equal(found["model"]["weight"], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(found["model"]["phase"], torch.tensor([1 + 2j], dtype=torch.complex128))
    assert (found["epoch"], found["history"], found[7]) == (3, [{"loss": 0.5, "k": "inf"}, None], (True, -1))


@pytest.mark.slow
@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("change", [0x01, 0x03, 0x80, 0xFF])
def test_a_changed_byte_anywhere_is_an_error(kind: str, change: int, tmp_path: Path) -> None:
    """In the header, in its padding, in the checksum itself, and in the tensors."""
    content = (WRITTEN / f"{kind}-{FORMAT}.safetensors").read_bytes()
    for i in range(len(content)):
        damaged = bytearray(content)
        damaged[i] ^= change
        (tmp_path / "file").write_bytes(damaged)
        with pytest.raises(PlasticError, match="file"):
            READERS[kind](tmp_path / "file")


@pytest.mark.parametrize("kind", READERS)
def test_a_file_that_ends_early_or_late_is_an_error(kind: str, tmp_path: Path) -> None:
    content = (WRITTEN / f"{kind}-{FORMAT}.safetensors").read_bytes()
    for changed in [*(content[:i] for i in range(len(content))), content + b"\0", content * 2]:
        (tmp_path / "file").write_bytes(changed)
        with pytest.raises(PlasticError, match="file"):
            READERS[kind](tmp_path / "file")


def test_the_message_about_damage_has_a_way_out(tmp_path: Path) -> None:
    save_checkpoint({"weight": torch.randn(100)}, tmp_path / "run")
    content = bytearray((tmp_path / "run").read_bytes())
    content[-50] ^= 1
    (tmp_path / "run").write_bytes(content)
    with pytest.raises(PlasticError, match=r"run is damaged or cut off: .*checksum.*write it anew"):
        load_checkpoint(tmp_path / "run")


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    for name in "ab":
        save_checkpoint({"b": {"z": 1, "a": torch.arange(3)}, "a": [torch.ones(2)]}, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_what_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(PlasticError, match="make tensors of long lists"):
        save_checkpoint({"names": "x" * 2**26}, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


# -- tensors that no file holds -----------------------------------------------------------------

UNHELD: dict[str, tuple[Callable[[], Any], str]] = {
    "sparse": (lambda: torch.eye(3).to_sparse(), "sparse.*to_dense"),
    "sparse by rows": (lambda: torch.eye(3).to_sparse_csr(), "sparse.*to_dense"),
    "quantised": (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8), "quantised.*dequantize"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested.*unbind"),
    "jagged": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        "nested.*unbind",
    ),
    "meta": (lambda: torch.zeros(2, device="meta"), "meta device.*no values"),
    "a type without a name": (lambda: torch.ones(2, dtype=torch.complex32), r"safetensors has no torch\.complex32"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", UNHELD)
def test_tensors_that_no_file_holds_are_refused(kind: str, tmp_path: Path) -> None:
    make, message = UNHELD[kind]
    path = tmp_path / "file.safetensors"
    save_checkpoint({"a": 1}, path)
    with pytest.raises(PlasticError, match=message):
        save_checkpoint({"epoch": 1, "state": [{"t": make()}]}, path)
    model = nn.Linear(2, 2)
    model.register_buffer("odd", make())
    with pytest.raises(PlasticError, match=message):
        save(model, path)
    assert load_checkpoint(path) == {"a": 1}


@pytest.mark.parametrize("tree", [[10**5000], [-(10**5000)], {10**5000: 1}])
def test_whole_numbers_that_python_would_not_read_are_refused(tree: Any, tmp_path: Path) -> None:
    with pytest.raises(PlasticError, match=r"cannot be written: a whole number has more than .* digits"):
        save_checkpoint(tree, tmp_path / "file.safetensors")
    assert not any(tmp_path.iterdir())


def test_tensors_that_look_at_others_are_whole(tmp_path: Path) -> None:
    t = torch.tensor([1 + 2j, 3 - 1j])
    tree = {"conjugate": t.conj(), "imaginary": t.conj().imag, "view": torch.arange(6).view(2, 3).t()[1:]}
    save_checkpoint(tree, tmp_path / "file.safetensors")
    found = load_checkpoint(tmp_path / "file.safetensors")
    assert all(torch.equal(found[name], value) for name, value in tree.items())
