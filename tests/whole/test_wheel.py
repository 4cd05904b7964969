"""The wheel holds the whole package, works without the source tree, and says what is true of itself."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plasticnet import __version__

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "release" / "wheel.py"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The wheel, and what the script prints, which builds it and tries it with the packages of this environment."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, str(SCRIPT), "--borrow", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "No matching distribution found for hatchling" in done.stderr:
        pytest.skip("the tools that build the wheel cannot be downloaded")
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("*.whl")
    return wheel, done.stdout


@pytest.mark.slow
def test_the_wheel_works_by_itself(built: tuple[Path, str]) -> None:
    wheel, printed = built
    assert wheel.name == f"plasticnet-{__version__}-py3-none-any.whl"
    assert f"plasticnet {__version__} is right" in printed
    assert str(ROOT) not in printed


@pytest.mark.slow
def test_every_package_is_in_the_wheel(built: tuple[Path, str]) -> None:
    source = ROOT / "src"
    packages = {p.parent.relative_to(source).as_posix() for p in source.rglob("__init__.py")}
    with zipfile.ZipFile(built[0]) as archive:
        names = archive.namelist()
    assert {Path(name).parent.as_posix() for name in names if name.endswith("/__init__.py")} == packages
    assert {name.partition("/")[0] for name in names} == {"plasticnet", f"plasticnet-{__version__}.dist-info"}


def changed(wheel: Path, to: Path, change: Callable[[str, bytes], bytes | None]) -> Path:
    """Copy a wheel with some of its files changed, or left out."""
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(to, "w") as new:
        for name in old.namelist():
            data = change(name, old.read(name))
            if data is not None:
                new.writestr(name, data)
    return to


def without(name: str) -> Callable[[str, bytes], bytes | None]:
    return lambda found, data: None if found.startswith(name) else data


def edited(name: str, old: bytes, new: bytes) -> Callable[[str, bytes], bytes | None]:
    return lambda found, data: data.replace(old, new) if found.endswith(name) else data


@pytest.mark.slow
@pytest.mark.parametrize(
    ("check", "change", "message"),
    [
        ("check_files", without("plasticnet/py.typed"), "py.typed"),
        ("check_files", without("plasticnet/growing/"), "plasticnet/growing"),
        ("check_files", edited("plasticnet/net.py", b"def ", b"def  "), "net.py"),
        (
            "check_metadata",
            edited("METADATA", b"License-Expression: Apache-2.0", b"License-Expression: MIT"),
            "licence",
        ),
        ("check_metadata", edited("METADATA", b"Version: 0", b"Version: 9"), r"CITATION\.cff has not 9"),
        ("check_metadata", edited("METADATA", b"Classifier: Typing :: Typed\n", b""), "Typing :: Typed"),
        ("check_metadata", edited("METADATA", b"https://arxiv", b"http://arxiv"), "no address of a project"),
        ("check_metadata", edited("entry_points.txt", b"plasticnet =", b"other ="), "command plasticnet is missing"),
    ],
)
def test_what_is_wrong_is_found(
    check: str, change: Callable[[str, bytes], bytes | None], message: str, built: tuple[Path, str], tmp_path: Path
) -> None:
    functions: dict[str, Any] = runpy.run_path(str(SCRIPT))
    functions[check](built[0])
    with pytest.raises(SystemExit, match=message):
        functions[check](changed(built[0], tmp_path / built[0].name, change))


def test_extras_that_messages_name_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    texts = [path.read_text() for path in [*(ROOT / "src").rglob("*.py"), ROOT / "README.md", *ROOT.glob("docs/*.md")]]
    named = {
        extra for text in texts for names in re.findall(r"plasticnet\[([\w,]+)\]", text) for extra in names.split(",")
    }
    assert {"cli", "hub"} <= named <= extras.keys()


def test_the_command_names_what_it_lacks() -> None:
    """Without typer there is one line, and not a traceback."""
    program = (
        "import sys; sys.modules['typer'] = None; import runpy; runpy.run_module('plasticnet', run_name='__main__')"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert found.stderr == "plasticnet: the commands need typer: pip install 'plasticnet[cli]'\n"
