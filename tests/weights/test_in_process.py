"""InProcessWeightSyncScheme keeps what every scheme keeps."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from helpers import row

from aioinfer import InferenceServer, InProcessWeightSyncScheme, ProcessInferenceServer
from aioinfer.weights import slots
from aioinfer.weights.copying import copy_tensors

from .models import Uniform
from .suite import SchemeConformance, check


class TestInProcess(SchemeConformance):
    """Trainer and server share a process."""

    def scheme(self, **options: Any) -> InProcessWeightSyncScheme:
        return InProcessWeightSyncScheme(**options)

    def test_it_stays_in_its_process(self) -> None:
        """It is not sent to another process, where it could do nothing."""
        scheme = self.scheme()
        with pytest.raises(TypeError, match="SharedMemWeightSyncScheme"):
            pickle.dumps(scheme)
        with pytest.raises(TypeError, match="SharedMemWeightSyncScheme"):
            ProcessInferenceServer(Uniform, weight_sync=scheme)


def test_a_trainer_that_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """5: Ctrl-C after each leaf of a copy: the last whole version stays, and a new one comes."""
    model, scheme = Uniform(leaves=3), InProcessWeightSyncScheme()
    scheme.init_on_sender(model=model)
    with InferenceServer(Uniform(leaves=3), weight_sync=scheme) as server:
        client, seen = server.sync_client(), 0
        for leaves in range(4):

            def copied(targets: Any, sources: Any, leaves: int = leaves) -> None:
                copy_tensors(targets[:leaves], sources[:leaves])
                raise KeyboardInterrupt

            with monkeypatch.context() as patched:
                patched.setattr(slots, "copy_tensors", copied)
                with pytest.raises(KeyboardInterrupt):
                    scheme.send(model=model.set_to(-1))
            assert check(client(row(1)), 0) == seen
            seen += 2  # the interrupted one has used a version up
            assert scheme.send(model=model.set_to(seen)).applied
            assert check(client(row(1)), 0) == seen
    scheme.close()
