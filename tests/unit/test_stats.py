"""Counters, windows, and the frozen snapshot."""

from __future__ import annotations

import dataclasses
import pickle
import threading
from collections.abc import Mapping

import pytest

from aioinfer.batching import Reason
from aioinfer.stats import WINDOW, BatchTimes, ServerStats, StatsRecorder


def times(
    *submitted_at: float, dispatched: float = 0.0, forward: float = 0.0, answered: float = 0.0
) -> BatchTimes:
    return BatchTimes(submitted_at, dispatched, forward, answered)


def read(recorder: StatsRecorder, now: float = 1.0, *, reset: bool = False) -> ServerStats:
    return recorder.snapshot(now, queue_depth=3, policy_version=5, reset=reset)


def record(recorder: StatsRecorder, rows: int, reason: Reason = Reason.FULL) -> None:
    recorder.batch(rows, reason, times(*[0.0] * rows))


class TestCounting:
    """What is counted."""

    def test_starts_at_zero(self) -> None:
        """A new server has done nothing, and no number of it is undefined."""
        stats = read(StatsRecorder(0.0), 0.0)
        numbers = [value for value in stats.values() if not isinstance(value, Mapping)]
        assert sum(numbers) == stats.queue_depth + stats.policy_version
        assert stats.batch_sizes == stats.reasons == {}

    def test_batches_rows_and_sizes(self) -> None:
        """The histogram says how many batches had how many rows, smallest first."""
        recorder = StatsRecorder(0.0)
        for rows in (4, 1, 4, 2):
            record(recorder, rows)
        stats = read(recorder)
        assert (stats.batches, stats.rows) == (4, 11)
        assert list(stats.batch_sizes.items()) == [(1, 1), (2, 1), (4, 2)]
        assert stats.avg_batch_size == 11 / 4

    def test_why_batches_left(self) -> None:
        """Reasons are counted under the names that users read."""
        recorder = StatsRecorder(0.0)
        for reason in (Reason.FULL, Reason.DEADLINE, Reason.FULL, Reason.ALL_CLIENTS_IN):
            record(recorder, 1, reason)
        assert read(recorder).reasons == {"full": 2, "deadline": 1, "all clients in": 1}

    def test_requests_by_their_fate(self) -> None:
        """Accepted, cancelled, timed out, failed, refused and updates each have a counter."""
        recorder = StatsRecorder(0.0)
        recorder.requests += 9
        recorder.cancelled += 1
        recorder.timed_out += 2
        recorder.failed += 3
        recorder.weight_updates += 4
        for _ in range(5):
            recorder.refuse()
        stats = read(recorder)
        assert (stats.requests, stats.cancelled, stats.timed_out) == (9, 1, 2)
        assert (stats.failed, stats.weight_updates, stats.refused) == (3, 4, 5)

    def test_refusals_of_many_threads_are_all_counted(self) -> None:
        """``refuse`` may be called on any thread; no count is lost."""
        recorder = StatsRecorder(0.0)

        def refuse() -> None:
            for _ in range(500):
                recorder.refuse()

        threads = [threading.Thread(target=refuse) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert read(recorder).refused == 2000

    def test_rates_are_over_the_time_elapsed(self) -> None:
        """Per-second figures divide by the seconds since the start."""
        recorder = StatsRecorder(10.0)
        recorder.requests += 8
        record(recorder, 6)
        stats = read(recorder, 14.0)
        assert stats.elapsed_s == 4.0
        assert (stats.requests_per_s, stats.rows_per_s, stats.batches_per_s) == (2.0, 1.5, 0.25)


class TestTable:
    """What ``print(stats)`` prints."""

    def test_a_server_at_work(self) -> None:
        """Counts, why batches left, most frequent first, and percentiles; no troubles, no line."""
        recorder = StatsRecorder(0.0)
        recorder.requests += 1234
        record(recorder, 2, Reason.DEADLINE)
        for _ in range(2):
            recorder.batch(2, Reason.FULL, times(0.0, 0.0, dispatched=0.5, forward=1, answered=2))
        assert str(read(recorder, 2.0)).splitlines() == [
            "requests                     1,234",
            "requests/s                     617",
            "batches                          3",
            "mean batch, rows               2.0",
            "why batches left",
            "  full                           2",
            "  deadline                       1",
            "times, ms                      p50       p95       p99",
            "  queue wait               500.000   500.000   500.000",
            "  forward                 1000.000  1000.000  1000.000",
            "  latency                 2000.000  2000.000  2000.000",
        ]

    def test_troubles_are_shown(self) -> None:
        """What did not go well stands below the requests, where anything did not."""
        recorder = StatsRecorder(0.0)
        recorder.timed_out += 2
        recorder.failed += 1
        lines = str(read(recorder)).splitlines()
        assert [line.split() for line in lines[:4]] == [
            ["requests", "0"],
            ["timed", "out", "2"],
            ["failed", "1"],
            ["requests/s", "0"],
        ]


class TestReset:
    """``reset=True``."""

    def test_the_snapshot_that_resets_still_has_everything(self) -> None:
        """Reading and resetting loses nothing in between."""
        recorder = StatsRecorder(0.0)
        record(recorder, 3)
        recorder.requests += 3
        assert read(recorder, reset=True).requests == 3
        assert read(recorder).requests == 0

    def test_counts_start_anew(self) -> None:
        """After a reset only what came later is counted, the histogram included."""
        recorder = StatsRecorder(0.0)
        record(recorder, 3, Reason.FULL)
        recorder.refuse()
        recorder.requests += 3
        read(recorder, 4.0, reset=True)
        record(recorder, 2, Reason.DEADLINE)
        recorder.requests += 2
        stats = read(recorder, 6.0)
        assert (stats.requests, stats.rows, stats.batches, stats.refused) == (2, 2, 1, 0)
        assert (stats.batch_sizes, stats.reasons) == ({2: 1}, {"deadline": 1})
        assert (stats.elapsed_s, stats.rows_per_s) == (2.0, 1.0)

    def test_percentiles_start_anew(self) -> None:
        """The window is emptied too."""
        recorder = StatsRecorder(0.0)
        recorder.batch(1, Reason.FULL, times(0.0, dispatched=1.0, forward=1.0, answered=2.0))
        read(recorder, reset=True)
        stats = read(recorder)
        assert (stats.p99_queue_ms, stats.p99_forward_ms, stats.p99_latency_ms) == (0, 0, 0)

    def test_what_is_the_present_is_not_reset(self) -> None:
        """Queue depth and policy version are states, not counts."""
        recorder = StatsRecorder(0.0)
        read(recorder, reset=True)
        stats = read(recorder)
        assert (stats.queue_depth, stats.policy_version) == (3, 5)


class TestPercentiles:
    """Times, in milliseconds."""

    def test_what_each_time_means(self) -> None:
        """Queue: submission to dispatch. Forward: the policy. Latency: submission to answer."""
        recorder = StatsRecorder(0.0)
        recorder.batch(1, Reason.FULL, times(1.0, dispatched=1.25, forward=0.5, answered=2.0))
        stats = read(recorder)
        assert (stats.p50_queue_ms, stats.p50_forward_ms, stats.p50_latency_ms) == (250, 500, 1000)

    def test_nearest_rank(self) -> None:
        """Over 101 requests waiting 0 to 100 ms, the p-th percentile is p ms."""
        recorder = StatsRecorder(0.0)
        recorder.batch(101, Reason.FULL, times(*[-i / 1000 for i in range(101)]))
        stats = read(recorder)
        found = [stats.p50_queue_ms, stats.p95_queue_ms, stats.p99_queue_ms]
        assert found == pytest.approx([50, 95, 99])

    def test_queue_times_are_per_request_and_forward_times_per_batch(self) -> None:
        """A large batch weighs by its requests in the waiting times only."""
        recorder = StatsRecorder(0.0)
        recorder.batch(9, Reason.FULL, times(*[0.0] * 9, dispatched=1.0, forward=1.0))
        recorder.batch(1, Reason.FULL, times(0.0, dispatched=5.0, forward=5.0))
        recorder.batch(1, Reason.FULL, times(0.0, dispatched=5.0, forward=5.0))
        stats = read(recorder)
        assert (stats.p50_queue_ms, stats.p50_forward_ms) == (1000, 5000)

    def test_are_over_the_latest_requests(self) -> None:
        """Older than the window is forgotten: after a slow start the figures recover."""
        recorder = StatsRecorder(0.0)
        recorder.batch(1, Reason.FULL, times(0.0, dispatched=100.0))
        for _ in range(WINDOW // 4):
            recorder.batch(4, Reason.FULL, times(0.0, 0.0, 0.0, 0.0, dispatched=0.001))
        assert read(recorder).p99_queue_ms == pytest.approx(1.0)


class TestMemory:
    """A server that runs for months."""

    @pytest.mark.parametrize("per_batch", [1, 7, 64, WINDOW, 3 * WINDOW])
    def test_the_window_is_bounded(self, per_batch: int) -> None:
        """However large the batches, about ``WINDOW`` requests are remembered."""
        recorder = StatsRecorder(0.0)
        one = times(*[0.0] * per_batch)
        for _ in range(3 * WINDOW // per_batch + 3):
            recorder.batch(per_batch, Reason.FULL, one)
        remembered = sum(len(batch.submitted_at) for batch in recorder._window)
        assert remembered <= max(WINDOW, per_batch)
        assert read(recorder).rows == per_batch * (3 * WINDOW // per_batch + 3)

    def test_the_histogram_has_an_entry_per_size(self) -> None:
        """Counting a batch of a known size adds nothing."""
        recorder = StatsRecorder(0.0)
        for i in range(10_000):
            recorder.batch(1 + i % 8, Reason.FULL, times(0.0))
        assert len(read(recorder).batch_sizes) == 8


class TestSnapshot:
    """The object that users read."""

    def test_is_frozen(self) -> None:
        """A snapshot does not change, neither by hand nor as the server goes on."""
        recorder = StatsRecorder(0.0)
        record(recorder, 2)
        stats = read(recorder)
        before = dict(stats)
        with pytest.raises(dataclasses.FrozenInstanceError):
            stats.requests = 5  # type: ignore[misc]
        record(recorder, 2)
        recorder.requests += 1
        assert dict(stats) == before
        assert stats.batch_sizes == {2: 1}

    def test_reads_like_a_mapping(self) -> None:
        """``stats["name"]`` and ``dict(stats)`` work for every field and property."""
        stats = read(StatsRecorder(0.0))
        assert isinstance(stats, Mapping)
        fields = {field.name for field in dataclasses.fields(stats)}
        properties = {
            name for name, value in vars(ServerStats).items() if isinstance(value, property)
        }
        assert set(stats) == fields | properties
        assert len(stats) == len(dict(stats)) == len(list(stats))
        assert all(stats[name] == getattr(stats, name) for name in stats)

    @pytest.mark.parametrize("name", ["nonsense", "_NAMES", "keys", "__class__"])
    def test_an_unknown_name_is_a_key_error(self, name: str) -> None:
        """Only figures can be read by name."""
        stats = read(StatsRecorder(0.0))
        with pytest.raises(KeyError, match=name):
            stats[name]
        assert name not in stats

    def test_torchrls_names_are_there(self) -> None:
        """A program that reads TorchRL's statistics finds them under the same names."""
        names = {"requests", "batches", "requests_per_s", "batches_per_s", "avg_batch_size"}
        names |= {"p50_queue_ms", "p95_queue_ms", "p50_forward_ms", "p95_forward_ms"}
        names |= {"policy_version", "weight_updates"}
        assert names <= set(read(StatsRecorder(0.0)))

    def test_can_be_pickled(self) -> None:
        """A snapshot can be sent to another process."""
        recorder = StatsRecorder(0.0)
        record(recorder, 2)
        stats = read(recorder)
        assert dict(pickle.loads(pickle.dumps(stats))) == dict(stats)


def test_reading_while_others_count_loses_nothing() -> None:
    """Snapshots that reset, on one thread, add up to what another thread counted."""
    recorder = StatsRecorder(0.0)
    done = threading.Event()
    seen: list[int] = []

    def reader() -> None:
        while not done.is_set():
            seen.append(read(recorder, reset=True).rows)

    thread = threading.Thread(target=reader)
    thread.start()
    for _ in range(3000):
        record(recorder, 1)
    done.set()
    thread.join()
    assert sum(seen) + read(recorder).rows == 3000
