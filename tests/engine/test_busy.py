"""A busy machine is noticed by what others had of the cores, whatever this process did itself."""

import pytest

from numoe.engine.measure.busy import Sample, taken_by_others


@pytest.mark.parametrize(
    ("seconds", "idle", "own", "cores", "threads", "others"),
    [
        (10, 0, 20, 2, 2, 0.0),  # alone
        (10, 0, 12, 2, 2, 0.8),
        (10, 8, 12, 2, 2, 0.0),  # the others wait
        (10, 0, 12, 2, 1, 0.0),  # one thread waits for nobody
        (1, 0, 1.2, 2, 2, 0.0),  # too short to tell
        (10, 20, 40, 8, 4, 0.0),  # there are cores enough
        (10, 0, 40, 8, 8, 4.0),
        (10, 0, 16.5, 2, 2, 0.0),  # a little
    ],
)
def test_what_others_took(seconds: float, idle: float, own: float, cores: int, threads: int, others: float) -> None:
    before = Sample(5.0, 100.0, 30.0, cores)
    after = Sample(5.0 + seconds, 100.0 + idle, 30.0 + own, cores)
    assert taken_by_others(before, after, threads) == pytest.approx(others)


def test_the_system_counts() -> None:
    first, second = Sample.now(), Sample.now()
    assert second.clock >= first.clock and second.own >= first.own > 0 and second.cores == first.cores >= 1
