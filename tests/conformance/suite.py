"""The conformance suite: what every link between actors and a server must do.

A transport's tests are a class that inherits :class:`TransportConformance` and says, in
:meth:`~conformance.hooks.Hooks.transport`, what it is about::

    class TestMyTransport(TransportConformance):
        def transport(self):
            return MyTransport()

What else can differ from link to link, and can be overridden, stands in ``hooks.py``. The
claims are in the files beside it, one file for each thing to be held.
"""

from __future__ import annotations

import pytest

from .answers import Answers
from .data import Data
from .errors import Errors
from .leaving import Leaving
from .lifecycle import Lifecycle
from .policy import Policies
from .queueing import Queueing


class TransportConformance(Answers, Data, Errors, Leaving, Lifecycle, Policies, Queueing):
    """Everything that holds on every link."""

    pytestmark = [pytest.mark.timeout(30)]
