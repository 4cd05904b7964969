"""Builds the wheel, checks what it holds and says of itself, and tries it in an environment of its own.

``make wheel`` writes it into ``dist`` and tries it in an empty environment, into which everything that it asks for is
installed. With ``--borrow`` the environment takes these packages from the one in which this script runs, and nothing
but the tools that build the wheel is downloaded.
"""

from __future__ import annotations

import argparse
import email
import re
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src"


def build(folder: Path) -> Path:
    """Build the wheel into a folder, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("plasticnet-*.whl"):
        old.unlink()
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT)
    (wheel,) = folder.glob("plasticnet-*.whl")
    return wheel


def check_files(wheel: Path) -> None:
    """Fail unless the wheel has every file of the package, with the same content, and no others."""
    paths = [p for p in (SOURCE / "plasticnet").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    wanted = {p.relative_to(SOURCE).as_posix(): p for p in paths}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        expect(names == wanted.keys(), f"only in one of wheel and source: {sorted(names ^ wanted.keys())[:5]}")
        changed = [name for name, path in wanted.items() if archive.read(name) != path.read_bytes()]
        expect(not changed, f"the wheel has another content of {changed[:5]}")
        expect(
            "plasticnet/py.typed" in names, "py.typed is missing, so that type checkers would ignore the annotations"
        )


def check_metadata(wheel: Path) -> str:
    """Fail unless the wheel says of itself what an index asks for and what is true, and return its version."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        found = email.message_from_string(archive.read(name).decode())
        licence = archive.read(name.replace("METADATA", "licenses/LICENSE"))
        (scripts,) = (archive.read(n).decode() for n in archive.namelist() if n.endswith("/entry_points.txt"))
    version = found["Version"]
    expect(licence == (ROOT / "LICENSE").read_bytes(), "the licence in the wheel is another one")
    expect(
        (found["License-Expression"], found["License-File"]) == ("Apache-2.0", "LICENSE"), "the licence is not named"
    )
    expect(found["Description-Content-Type"] == "text/markdown", "the description is not said to be Markdown")
    expect(str(found.get_payload()).startswith("# plasticnet"), "the description is not the README")
    expect("plasticnet = plasticnet.__main__:main" in scripts, "the command plasticnet is missing")
    minors = re.findall(r"3\.(\d+)", found["Requires-Python"])
    pythons = [f"Programming Language :: Python :: 3.{minor}" for minor in range(int(minors[0]), int(minors[1]))]
    missing = {*pythons, "Typing :: Typed"} - set(found.get_all("Classifier", []))
    expect(not missing, f"classifiers are missing: {sorted(missing)}")
    links = [url.split(", ", 1)[1] for url in found.get_all("Project-URL", [])]
    wrong = [url for url in links if not url.startswith("https://") or "/simple" in url or "pypi" in url]
    expect(not wrong, f"no address of a project: {wrong}")
    needed = [r for r in found.get_all("Requires-Dist", []) if "extra ==" not in r]
    expect(all("plasticnet" not in r and "@" not in r for r in needed), f"requirements: {needed}")
    expect(f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(), f"CITATION.cff has not {version}")
    expect(f"\n## [{version}]" in (ROOT / "CHANGELOG.md").read_text(), f"CHANGELOG.md has no part about {version}")
    return version


def make_environment(folder: Path, wheel: Path, borrow: bool) -> Path:
    """Make an environment with the wheel, and return its interpreter.

    Args:
        folder: Where the environment is made.
        wheel: The wheel.
        borrow: Whether what it asks for is taken from the environment of this interpreter.
    """
    venv.create(folder, with_pip=False)
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    if not borrow:
        run(*pip, "-c", ROOT / "constraints.txt", wheel)
        return python
    run(*pip, "--no-deps", "--no-index", wheel)
    own = run(python, "-I", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    # A folder named in a .pth file comes after those of the environment, and the .pth files in it are not read: so an
    # editable plasticnet there stays unseen.
    Path(own, "borrowed.pth").write_text("".join(f"{sysconfig.get_path(p)}\n" for p in ("purelib", "platlib")))
    return python


def try_commands(python: Path, wheel: Path, borrow: bool) -> None:
    """Run the command line: first without its extra, where the environment has none, and then with it."""
    command = [python, "-I", "-m", "plasticnet"]
    if not borrow:
        refused = subprocess.run([*map(str, command), "--help"], capture_output=True, text=True, check=False)
        expect(refused.returncode == 2 and "plasticnet[cli]" in refused.stderr, f"without the extra: {refused.stderr}")
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
        run(*pip, "-c", ROOT / "constraints.txt", f"{wheel}[cli]")
    expect("shrink" in run(*command, "--help"), "the commands are not listed")
    expect('"sites"' in run(*command, "inspect", "lenet5", "--json"), "inspect finds no sites")
    expect("inspect" in run(python.with_name("plasticnet"), "--help"), "the command plasticnet does not run")


def run(*command: object) -> str:
    """Run a command outside of the source tree, and return what it prints; end with its errors where it fails."""
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run([str(c) for c in command], cwd=elsewhere, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def expect(true: bool, message: str) -> None:
    """End with a message unless something is true."""
    if not true:
        sys.exit(f"the wheel is not right: {message}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="the folder for the wheel")
    parser.add_argument("--borrow", action="store_true", help="take the other packages from this environment")
    given = parser.parse_args(arguments)
    wheel = build(given.out.resolve())
    check_files(wheel)
    version = check_metadata(wheel)
    with tempfile.TemporaryDirectory() as folder:
        python = make_environment(Path(folder) / "env", wheel, given.borrow)
        print(run(python, "-I", ROOT / "release" / "trial.py"), end="")
        try_commands(python, wheel, given.borrow)
    print(f"plasticnet {version} is right: {wheel.name}, {wheel.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
