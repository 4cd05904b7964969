"""A soak: damaged and crafted files are read, or refused by a `PlasticError`; never a crash, a hang, or much memory.

``make soak`` runs ``python benchmarks/soak_files.py --count 50000`` beside the other soaks. Sound files of every kind
that is read are changed at random: bytes are flipped, cut out, doubled and overwritten, and what is JSON in them gets
other values and keys. A run with one such file is shown in a report, and predicts. Files with a checksum mostly get the
right one for what they have become, or nothing behind it would be tried. Each case has five seconds, and a GiB of
memory more than the process has. Results are written after every chunk, and a call goes on from them. ``--seed N
--count 1`` runs one case. soak_table.py writes docs/soak.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "experiments"))
RESULT = HERE / "results" / "soak_files.json"
CHUNK = 500
SECONDS, MEMORY = 5, 2**30
GOOD = ("read", "refused")


class Hang(BaseException):
    """A case has taken too long."""


class Soak:
    """The kinds of files, each with sound ones and what reads them.

    Args:
        folder: Where the files are written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.readers: dict[str, tuple[str, list[bytes], Callable[[Path], Any]]] = {}
        self._tensors()
        self._runs()
        self._tables()
        for suffix, contents, reader in self.readers.values():
            for content in contents:
                path = folder / f"case{suffix}"
                path.write_bytes(content)
                reader(path)  # or nothing of it would be tried

    def _tensors(self) -> None:
        import torch
        from safetensors.torch import save as serialise
        from torch import nn

        import plasticnet as pn
        import plasticnet.hub as pn_hub
        from plasticnet.files.weights import load_weights

        def build() -> nn.Module:
            return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))

        torch.manual_seed(0)
        net = pn.PlasticNet(build(), (torch.randn(3, 4),), inputs=("0",))
        net.resize({name: range(2) for name in net.sites})
        small, path = net.compact(), self.folder / "sound"
        pn.save(small, path)
        modules = [path.read_bytes()]
        tree = {"net": net.state_dict(), "history": [{"loss": 0.5, "k": "inf"}, None, (True, -1)], 7: "seven"}
        pn.save_checkpoint(tree, path)
        checkpoints = [path.read_bytes()]
        torch.save(build().state_dict(), path)
        pickled = path.read_bytes()
        pn_hub.save_pretrained(small, path.with_name("hub"))
        config = (path.with_name("hub") / pn_hub.CONFIG).read_bytes()

        def hub(path: Path) -> Any:
            (self.folder / "hub" / pn_hub.CONFIG).write_bytes(path.read_bytes())
            return pn_hub.from_pretrained(self.folder / "hub", build)

        old = HERE.parent / "tests" / "files" / "written"
        self.readers |= {
            "compact module": (".safetensors", modules, lambda p: pn.load(p, build)),
            "compact module, format 1": (
                ".safetensors",
                [(old / "module-1.safetensors").read_bytes()],
                lambda p: pn.load(p, lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))),
            ),
            "checkpoint": (".safetensors", checkpoints, pn.load_checkpoint),
            "checkpoint, format 1": (
                ".safetensors", [(old / "checkpoint-1.safetensors").read_bytes()], pn.load_checkpoint,
            ),
            "state dict of torch": (".pt", [pickled], lambda p: load_weights(build(), p)),
            "state dict in safetensors": (
                ".safetensors", [serialise(build().state_dict())], lambda p: load_weights(build(), p),
            ),
            "config of a folder of the hub": (".json", [config], hub),
        }  # fmt: skip

    def _runs(self) -> None:
        from plasticnet.apps.folder import CONFIG, METRICS, PREPARED, REPORT, SUMMARY, read_run
        from plasticnet.apps.loading import load_any
        from plasticnet.apps.own_data import Reading
        from plasticnet.apps.predicting import predict
        from plasticnet.apps.prepared import Prepared, read_prepared
        from plasticnet.apps.runs import compare_runs, rewrite_report, train_modes
        from plasticnet.apps.settings import Config, Run

        table = self.folder / "sound.csv"
        table.write_text("size,town,y\n" + "".join(f"{i}.5,{'ab'[i % 2]},{i % 3}\n" for i in range(40)))
        data = load_any(str(table), Reading(target="y"), 0)
        run = Run("houses.csv", Reading(target="y"), "mlp:8-4", "prune", "cpu", Config(inputs=("1",)))
        prepared = json.dumps(Prepared.of(data).as_dict(), indent=2).encode()
        place = self.folder / "run"
        place.mkdir()

        def put(name: str, path: Path) -> Path:
            (place / name).write_bytes(path.read_bytes())
            return place / name

        whole = self.folder / "whole"
        small = replace(run, data=str(table), config=Config(epochs=3))
        train_modes(small, data, whole)

        def shown(name: str) -> Callable[[Path], None]:
            """Return what shows a run of which one file is damaged, in its report and in a comparison."""
            folder = Path(shutil.copytree(whole, self.folder / f"shown {name}"))

            def reader(path: Path) -> None:
                (folder / name).write_bytes(path.read_bytes())
                rewrite_report(folder)
                compare_runs([folder, whole], self.folder / "page.html")
                for page in (folder / REPORT, self.folder / "page.html"):
                    assert "<script" not in page.read_text(), page

            return reader

        def predicted(name: str) -> Callable[[Path], int]:
            """Return what predicts by a run of which one file is damaged."""
            folder = Path(shutil.copytree(whole, self.folder / f"predicted {name}"))

            def reader(path: Path) -> int:
                (folder / name).write_bytes(path.read_bytes())
                return predict(folder, str(table), self.folder / "predictions.csv")

            return reader

        self.readers |= {
            "run.json": (
                ".json",
                [json.dumps({**run.as_dict(), "record": {"torch": "2"}}, indent=2).encode()],
                lambda p: read_run(put(CONFIG, p), "run.json", "write it anew"),
            ),
            "prepared.json": (".json", [prepared], lambda p: read_prepared(put(PREPARED, p).parent, "predict")),
            "report of run.json": (".json", [(whole / CONFIG).read_bytes()], shown(CONFIG)),
            "report of summary.json": (".json", [(whole / SUMMARY).read_bytes()], shown(SUMMARY)),
            "report of metrics.jsonl": (".jsonl", [(whole / METRICS).read_bytes()], shown(METRICS)),
            "predict by run.json": (".json", [(whole / CONFIG).read_bytes()], predicted(CONFIG)),
            "predict by prepared.json": (".json", [(whole / PREPARED).read_bytes()], predicted(PREPARED)),
        }

    def _tables(self) -> None:
        import io

        import numpy as np
        import pyarrow as pa
        from PIL import Image
        from pyarrow import parquet

        from plasticnet.apps.loading import load_any
        from plasticnet.apps.own_data import Reading

        def load(how: Reading) -> Callable[[Path], Any]:
            return lambda path: load_any(str(path), how, 0)

        def written(table: pa.Table) -> bytes:
            sink = io.BytesIO()
            parquet.write_table(table, sink)
            return sink.getvalue()

        def image(kind: str, seed: int) -> bytes:
            sink = io.BytesIO()
            Image.fromarray(np.random.default_rng(seed).integers(0, 255, (6, 6, 3), np.uint8)).save(sink, kind)
            return sink.getvalue()

        columns = {"size": [i + 0.5 for i in range(40)], "town": ["a", "b"] * 20, "y": [i % 3 for i in range(40)]}
        arrays = io.BytesIO()
        np.savez(arrays, x=np.ones((40, 3), np.float32), y=np.arange(40) % 3)
        pictures = {"image": [image("png", i) for i in range(12)], "label": [i % 2 for i in range(12)]}
        place = self.folder / "images"
        (place / "a").mkdir(parents=True)
        (place / "b").mkdir()
        for i in range(6):
            (place / "ab"[i % 2] / f"{i}.png").write_bytes(image("png", i))

        def folder(path: Path) -> Any:
            (place / "a" / "0.png").write_bytes(path.read_bytes())
            return load_any(str(place), Reading(image_size=6), 0)

        self.readers |= {
            "table of text": (".csv", [(self.folder / "sound.csv").read_bytes()], load(Reading(target="y"))),
            "table in parquet": (".parquet", [written(pa.table(columns))], load(Reading(target="y"))),
            "images in parquet": (".parquet", [written(pa.table(pictures))], load(Reading(task="classification"))),
            "image in a folder": (".png", [image(k, 0) for k in ("png", "jpeg", "bmp", "webp")], folder),
            "arrays of numpy": (".npz", [arrays.getvalue()], load(Reading())),
        }

    def case(self, seed: int) -> tuple[str, str, str]:
        """Run one case, and return the kind of file, what came of it, and what there is to say of it."""
        from soak_changes import changed

        draw = random.Random(seed)
        kind = list(self.readers)[seed % len(self.readers)]
        suffix, sound, reader = self.readers[kind]
        path = self.folder / f"case{suffix}"
        path.write_bytes(changed(draw, draw.choice(sound), suffix))
        return kind, *outcome(reader, path)


def outcome(reader: Callable[[Path], Any], path: Path) -> tuple[str, str]:
    """Read a file, in a process that is `bounded`; return what came of it, and what there is to say of it."""
    from plasticnet import PlasticError

    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        reader(path)
        return "read", ""
    except PlasticError:
        return "refused", ""
    except Hang:
        return "hang", traceback.format_exc(limit=-3)
    except MemoryError:
        return "memory", traceback.format_exc(limit=-3)
    except Exception:
        return "another error", traceback.format_exc(limit=-3)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def bounded(output: int) -> None:
    """Give this process a bound of memory, one thread, an alarm that ends hangs, and this file for what it prints."""
    import torch

    def hang(*_: Any) -> None:
        raise Hang

    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, hang)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
    os.dup2(output, 1)
    os.dup2(output, 2)


def chunk(seeds: range, soak: Soak) -> list[dict[str, Any]]:
    """Run cases in a process of its own; one that ends with it is a crash, and the rest is run in another."""
    rows: list[dict[str, Any]] = []
    while len(rows) < len(seeds):
        read, write = os.pipe()
        number = os.fork()
        if not number:
            os.close(read)
            work(seeds[len(rows) :], soak, write)
        os.close(write)
        with open(read) as lines:
            rows += [json.loads(line) for line in lines]
        _, status = os.waitpid(number, 0)
        if len(rows) < len(seeds):
            seed = seeds[len(rows)]
            kind = list(soak.readers)[seed % len(soak.readers)]
            rows.append({"seed": seed, "kind": kind, "found": "crash", "what": f"status {status}"})
    return rows


def work(seeds: range, soak: Soak, write: int) -> None:
    """Run cases in this process, print a line for each, and end it."""
    bounded(os.open(os.devnull, os.O_WRONLY))
    with open(write, "w") as out:
        for seed in seeds:
            kind, found, what = soak.case(seed)
            out.write(json.dumps({"seed": seed, "kind": kind, "found": found, "what": what}) + "\n")
            out.flush()
    os._exit(0)


def main(arguments: list[str] | None = None) -> int:
    """Run cases until there were so many; return 1 where one was neither read nor refused."""
    from common import environment

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=50_000, help="how many cases, those of earlier calls included")
    parser.add_argument("--seed", type=int, help="run the cases from this seed on, and write nothing")
    parser.add_argument("--minutes", type=float, default=600.0, help="no chunk begins after so many minutes")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="soak-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        soak = Soak(Path(folder))
        if options.seed is not None:
            rows = chunk(range(options.seed, options.seed + options.count), soak)
            bad = [row for row in rows if row["found"] not in GOOD]
            print(*(rows if options.count == 1 else bad), sep="\n")
            return int(bool(bad))
        result: dict[str, Any] = {"environment": environment(), "settings": {"seconds": SECONDS, "memory": MEMORY}}
        result |= {"done": 0, "seconds": 0.0, "commits": [], "counts": {}, "failures": []}
        if options.out.exists():
            result |= {k: v for k, v in json.loads(options.out.read_text()).items() if k != "environment"}
        result["commits"] = [*dict.fromkeys([*result["commits"], result["environment"]["commit"]])]
        end = time.monotonic() + 60 * options.minutes
        while result["done"] < options.count and time.monotonic() < end:
            begun = time.monotonic()
            rows = chunk(range(result["done"], min(result["done"] + CHUNK, options.count)), soak)
            for row in rows:
                counts = Counter(result["counts"].get(row["kind"], {}))
                counts[row["found"]] += 1
                result["counts"][row["kind"]] = dict(counts)
                if row["found"] not in GOOD:
                    result["failures"].append(row)
                    print(row, flush=True)
            result["done"] += len(rows)
            result["seconds"] += time.monotonic() - begun
            options.out.write_text(json.dumps(result, indent=1) + "\n")
            print(result["done"], f"{result['seconds']:.0f} s", flush=True)
    return int(bool(result["failures"]))


if __name__ == "__main__":
    sys.exit(main())
