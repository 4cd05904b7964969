"""Runs the gated network and the one with all units open on the same inputs, and sums what a reader sees in both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from plasticnet.gates.acting import places_of, swapped
from plasticnet.gates.gated import GatedModel
from plasticnet.gates.meanwhile import own_gates
from plasticnet.repairing.errors import OutputErrors
from plasticnet.repairing.onward import Enough, Onward
from plasticnet.repairing.products import Product
from plasticnet.repairing.readers import Reader
from plasticnet.repairing.sums import Sums
from plasticnet.repairing.watching import Seen, watching
from plasticnet.tools.batches import Calibration, Forward, run_batch
from plasticnet.tools.inputs import Outputs, copy_inputs
from plasticnet.tools.outputs import counted
from plasticnet.tools.snapshot import RandomState

ROWS, _LEAST = 32, 8192  # so many rows are read for each input of a reader, but at least so many in all


class Unpaired(Exception):
    """Says that the two networks do not multiply a reader with the same activations."""


class _Meeting:
    """Brings together what a reader computes on one batch in both networks, call by call.

    Args:
        reader: The reader.
        rows: How many rows are read for each call.
        generator: What chooses them.
        sums: What they are added to.
    """

    def __init__(self, reader: Reader, rows: int, generator: torch.Generator, sums: Sums) -> None:
        self._reader, self._rows, self._generator, self._sums = reader, rows, generator, sums
        self._columns = reader.inputs[0].nonzero()[:, 0] if len(reader.inputs) == 1 else None
        self._wanted: list[tuple[int, Tensor | None, Tensor]] = []
        self._met = 0

    def wanted(self, product: Product) -> None:
        """Note what the network with all units open computes."""
        pick, n = None, product.rows
        if n > self._rows:
            drawn = torch.randperm(n, generator=self._generator)[: self._rows]
            pick = drawn.sort().values.to(product.out.device)
        self._wanted.append((n, pick, product.outputs(pick).clone()))
        if len(self._wanted) == self._reader.calls:
            raise Enough

    def had(self, product: Product) -> None:
        """Add what the gated network computes."""
        if self._met == len(self._wanted):
            raise Unpaired
        n, pick, wanted = self._wanted[self._met]
        self._met += 1
        if product.rows != n:
            raise Unpaired
        x, had = product.inputs(pick), product.outputs(pick)
        self._sums.add(x if self._columns is None else x[:, :, self._columns], wanted, had, product.addend_scale)
        if self._met == self._reader.calls:
            raise Enough

    def end(self) -> None:
        """Raise `Unpaired` unless both networks have called the reader equally often."""
        if self._met < len(self._wanted):
            raise Unpaired


class Paired:
    """The gated network, and what it was with more units open.

    Args:
        net: The network, in evaluation mode.
        data: The inputs.
        forward: What runs the network on a batch, where its form does not fit.
        outputs: What counts in the output.
        towards: Which units were open then, shape (units,), for each site; None stands for all.

    Attributes:
        original: The parameters and buffers that were changed, as they were before, by name.
    """

    def __init__(
        self,
        net: GatedModel,
        data: Calibration,
        forward: Forward | None,
        outputs: Outputs | None,
        towards: Mapping[str, Tensor] | None,
    ) -> None:
        self.net, self.data, self.forward, self.outputs, self._towards = net, data, forward, outputs, towards
        self.original: dict[str, Tensor] = {}
        self._recurrent = [m for m in net.model.modules() if isinstance(m, nn.RNNBase)]
        self._held = {**dict(net.model.named_parameters()), **dict(net.model.named_buffers())}
        self._onward = Onward(net.model, lambda batch: run_batch(net, batch, forward))
        self._random = RandomState(net.model)

    def tensor(self, name: str) -> Tensor:
        """Return a parameter or buffer that is about to be changed, and remember what it was."""
        tensor = self._held[name].detach()
        self.original.setdefault(name, tensor.clone())
        return tensor

    def put_back(self) -> None:
        """Put back all that was changed."""
        with torch.no_grad():
            for name, before in self.original.items():
                self._held[name].detach().copy_(before)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Let the network be what it was with more units open, within this context."""
        parameters = {n: t for n, t in self.original.items() if isinstance(self._held[n], nn.Parameter)}
        buffers = {n: t for n, t in self.original.items() if n not in parameters}
        now = {n: self._held[n].clone() for n in buffers}
        with (
            own_gates(self.net, self._towards),
            swapped(places_of(self.net.model, set(parameters)), parameters, self._recurrent),
        ):
            for name, tensor in buffers.items():
                self._held[name].copy_(tensor)
            try:
                yield
            finally:
                for name, tensor in now.items():
                    self._held[name].copy_(tensor)

    def run(self, batch: Any) -> Any:
        """Run the network on a batch, of which it gets a copy, and return the output."""
        self._random.restore()
        return run_batch(self.net, copy_inputs(batch), self.forward)

    def look(self) -> Seen:
        """Return how the parameters are read when the gated network runs."""
        with watching(self.net.model, lambda _: None, look=True) as mode:
            self.run(self.data.fitted[0])
        return mode.seen

    def error(self) -> float:
        """Return the error of the outputs on the inputs held out, as a share of their variance."""
        errors = OutputErrors()
        for batch in self.data.held_out:
            with self.opened():
                wanted = counted(self.run(batch), self.outputs)
            errors.add(wanted, counted(self.run(batch), self.outputs))
        return errors.share

    def sums(self, reader: Reader) -> tuple[Sums, Sums]:
        """Return the sums for a reader over the inputs to fit, and over those held out.

        Raises:
            Unpaired: The two networks do not multiply it with the same activations.
        """
        used = int(reader.inputs.sum(1).max()) if len(reader.inputs) else 0
        rows = -(-max(ROWS * used, _LEAST) // len(self.data.fitted))
        return self._sums(reader, "fitted", rows), self._sums(reader, "held out", rows)

    def _sums(self, reader: Reader, part: str, rows: int) -> Sums:
        """Return the sums for a reader over a part of the inputs.

        Args:
            reader: The reader.
            part: "fitted" or "held out".
            rows: How many rows are read for each batch and call; they are chosen at random.
        """
        sums = Sums()
        generator = torch.Generator().manual_seed(0)
        for i, batch in enumerate(self.data.fitted if part == "fitted" else self.data.held_out):
            meeting = _Meeting(reader, rows, generator, sums)
            with self.opened():
                self._onward.until((True, part, i), batch, reader.place, meeting.wanted, summed=reader.summed)
            self._onward.until((False, part, i), batch, reader.place, meeting.had, summed=reader.summed)
            meeting.end()
        return sums
