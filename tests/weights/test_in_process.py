"""InProcessWeightSyncScheme keeps what every scheme keeps."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

from aioinfer import InProcessWeightSyncScheme, ProcessInferenceServer
from aioinfer.weights.delivery import Delivery, Stage
from aioinfer.weights.in_process import _InProcessLink
from aioinfer.weights.reading import Weights
from aioinfer.weights.receiving import Receiver

from .models import Uniform
from .suite import Hooks, SchemeConformance, Torn


class TestInProcess(SchemeConformance):
    """Trainer and server share a process."""

    crosses = False

    def scheme(self, **options: Any) -> InProcessWeightSyncScheme:
        return InProcessWeightSyncScheme(**options)

    def test_it_stays_in_its_process(self) -> None:
        """It is not sent to another process, where it could do nothing."""
        scheme = self.scheme()
        with pytest.raises(TypeError, match="SharedMemWeightSyncScheme"):
            pickle.dumps(scheme)
        with pytest.raises(TypeError, match="SharedMemWeightSyncScheme"):
            ProcessInferenceServer(Uniform, weight_sync=scheme)


class _Careless(_InProcessLink):
    """Writes into what serves, leaf by leaf, as a background thread of another library does."""

    def publish(
        self, weights: Weights, delivery: Delivery, epoch: int, timeout: float | None
    ) -> None:
        slot = self.receiver.slots.current
        with torch.no_grad():
            for target, source in zip(slot.model.parameters(), weights.tensors, strict=True):
                target.copy_(source)
        slot.version = delivery.version
        delivery.note(self.receiver.name, Stage.APPLIED)


class _CarelessScheme(InProcessWeightSyncScheme):
    def _make_link(self, receiver: Receiver) -> _Careless:
        return _Careless(self, receiver)


class TestThatTheTornReadTestCanFail(Hooks):
    """1: a scheme that does not keep the promise is found out."""

    def test_a_careless_scheme(self) -> None:
        """1: the torn-read test fails for a scheme that writes into what serves."""
        with pytest.raises(Torn):
            self.bombard(_CarelessScheme(), wait="applied")
