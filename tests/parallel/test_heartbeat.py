"""What ranks say to each other about being alive, over a store of this process."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.distributed import HashStore

from verifier.core.messages import encode
from verifier.parallel import heartbeat
from verifier.parallel.heartbeat import HeartbeatMonitor, RankFailure, RankHeartbeat
from verifier.runtime import handle


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(heartbeat, "time", clock)
    return clock


def pair() -> tuple[HeartbeatMonitor, HeartbeatMonitor]:
    """Rank 0, which watches rank 1, and rank 1."""
    store = HashStore()
    return (
        HeartbeatMonitor(0, store, {}, lambda rank: "", [1], None),
        HeartbeatMonitor(1, store, {}, lambda rank: "", [0], None),
    )


def test_silence_is_noticed_with_the_last_phase(clock: Clock) -> None:
    first, second = pair()
    for _ in range(3):
        second.phase("bound")
        first._look_at_heartbeats()
        clock.now += heartbeat.SILENCE_SECONDS - 1
    assert first.failure is None
    clock.now += 2
    first._look_at_heartbeats()
    assert first.failure == "rank 1 has not responded for 16 s during bound"


def test_patience_is_what_the_documentation_says(root: Path) -> None:
    text = " ".join((root / "docs" / "parallel.md").read_text(encoding="utf-8").split())
    assert f"one without a heartbeat for {heartbeat.SILENCE_SECONDS:.0f} s is given up" in text
    assert handle.SILENCE_SECONDS == heartbeat.SILENCE_SECONDS


def test_a_rank_has_longer_to_start(clock: Clock) -> None:
    first, _ = pair()
    first._look_at_heartbeats()
    clock.now += 4 * heartbeat.SILENCE_SECONDS
    first._look_at_heartbeats()
    assert first.failure is None
    clock.now += heartbeat.SILENCE_SECONDS + 1
    first._look_at_heartbeats()
    assert first.failure == "rank 1 has not responded for 76 s during start-up"


@pytest.mark.parametrize("memory", [False, True])
def test_a_report_is_read(memory: bool) -> None:
    first, second = pair()
    second.phase("split_neurons")
    second.report("planted", out_of_memory=memory)
    first._look_at_heartbeats()
    assert (first.failure, first.memory) == ("rank 1 failed during split_neurons: planted", memory)


def test_the_end_of_the_job_is_noticed() -> None:
    first, second = pair()
    first.phase("memory")
    second._look_at_heartbeats()
    assert second.failure is None
    first.end_job()
    second._look_at_heartbeats()
    assert second.failure == "rank 0 has ended the job"


def test_another_program_at_the_store_is_no_heartbeat() -> None:
    first, _ = pair()
    failure = RankFailure("bound", "planted", False)
    first._store.set("heartbeat/1", encode(failure).decode())
    with pytest.raises(ValueError, match="a message is 'RankFailure'; expected was RankHeartbeat"):
        first._look_at_heartbeats()
    assert RankHeartbeat(1, "bound") != RankHeartbeat(2, "bound")
