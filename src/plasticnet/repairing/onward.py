"""Runs a model on the same batches again and again, each time from where the last run on that batch has ended."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from torch import nn

from plasticnet.repairing.products import Place, Product
from plasticnet.repairing.resuming import Diverged, Record
from plasticnet.repairing.watching import watching
from plasticnet.tools.batches import like_model
from plasticnet.tools.inputs import copy_inputs
from plasticnet.tools.snapshot import RandomState

MEMORY = 2**30  # the bytes of activations that are kept to begin runs from


class Enough(BaseException):  # not an Exception, because a model may catch those
    """Ends a run of the model: all that is wanted of it was seen."""


class Onward:
    """Runs a model on batches, up to one product after the other.

    Args:
        model: The model.
        run: Runs the model, or a network around it, on a batch.
    """

    def __init__(self, model: nn.Module, run: Callable[[Any], Any]) -> None:
        self._model, self._run = model, run
        self._records: dict[Hashable, Record] = {}
        self._random = RandomState(model)

    def until(self, key: Hashable, batch: Any, place: Place, notice: Callable[[Product], None], **options: Any) -> None:
        """Run the model until the products of a place were noticed, beginning where the last run has ended.

        Args:
            key: What tells the runs on one batch from those on another one, or of another state of the model.
            batch: The batch.
            place: The place.
            notice: What is called with its products. It raises `Enough` when it has seen all that it wants.
            options: Further arguments of `Products`.
        """
        record = self._records.pop(key, None)
        if record is not None and record.usable:
            try:
                return self._recorded(key, record, place, notice, options)
            except Diverged:
                pass
        self._random.restore()
        fresh = Record(copy_inputs(like_model(self._model, batch)))
        return self._recorded(key, fresh, place, notice, options)

    def forget(self) -> None:
        """Let the next runs begin at the start."""
        self._records = {}

    def _recorded(
        self,
        key: Hashable,
        record: Record,
        place: Place,
        notice: Callable[[Product], None],
        options: dict[str, Any],
    ) -> None:
        """Do what `until` does, from a record on, and keep the record if there is room for it."""
        record.whole = False
        try:
            with watching(self._model, notice, only=place, record=record, **options):
                self._run(record.batch)
        except Enough:
            pass
        if record.whole and record.bytes + sum(r.bytes for r in self._records.values()) <= MEMORY:
            self._records[key] = record
