"""Run all tests of tests/integrations, and write a row for each check to results/integrations.json.

``make integrations`` installs what they need first. What is skipped here, for want of a package or a GPU, keeps the row
of an earlier run in which it was not.
"""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from common import environment, write, written

ROOT = Path(__file__).parent.parent
HEAVY = "PLASTICNET_INTEGRATIONS"  # with this variable, tests run that are too heavy for every day
PACKAGES = {
    "Lightning": ("lightning", "pytorch-lightning"), "Hugging Face Trainer": ("transformers", "accelerate"),
    "Accelerate": ("accelerate",),
}  # fmt: skip


def versions(integration: str) -> dict[str, str]:
    """The versions of what an integration needs, as far as it is installed."""
    found = {"torch": torch.__version__}
    for package in PACKAGES.get(integration, ()):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def row(case: ET.Element) -> dict[str, Any]:
    """What one test has shown."""
    properties = {p.attrib["name"]: p.attrib["value"] for p in case.iter("property")}
    skipped = next((s.attrib.get("message", "") for s in case.iter("skipped")), None)
    failed = any(True for kind in ("failure", "error") for _ in case.iter(kind))
    return {
        "integration": properties["integration"],
        "processes": int(properties["processes"]),
        "check": properties["check"],
        "test": f"{case.attrib['classname'].rpartition('.')[2]}::{case.attrib['name']}",
        "passed": None if skipped is not None else not failed,
        "skipped": skipped,
        "seconds": round(float(case.attrib["time"]), 1),
        "versions": versions(properties["integration"]),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "commit": environment()["commit"],
        "date": datetime.date.today().isoformat(),
    }


def main() -> int:
    """Run the tests; arguments are handed to pytest, such as -k."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-o", "addopts=", "-q", "-o", "junit_family=xunit1", f"--junitxml={report}", *sys.argv[1:]]
        command = [sys.executable, "-m", "pytest", str(ROOT / "tests" / "integrations"), *options]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        code = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path, HEAVY: "1"}, check=False
        ).returncode
        cases = list(ET.parse(report).getroot().iter("testcase"))
    found = [row(case) for case in cases if any(p.attrib["name"] == "check" for p in case.iter("property"))]
    before = {r["test"]: r for r in written("integrations")}
    kept = [before[r["test"]] if r["passed"] is None and r["test"] in before else r for r in found]
    others = [r for r in before.values() if sys.argv[1:] and r["test"] not in {f["test"] for f in found}]
    write("integrations", {}, sorted([*kept, *others], key=lambda r: (r["integration"], r["processes"], r["test"])))
    return code


if __name__ == "__main__":
    sys.exit(main())
