"""What the gateway hears of a load."""

import itertools

from brim.worker.progress import ProgressReports
from brim.worker.protocol import LoadProgress


def test_reports_are_ten_a_second_and_rise() -> None:
    """However often an engine tells, and whatever it tells, a bar moves steadily and forward."""
    now_s = 0.0
    sent: list[tuple[float, LoadProgress]] = []
    reports = ProgressReports(lambda frame: sent.append((now_s, frame)), lambda: now_s)
    for number in range(1000):
        now_s = number / 100
        reports(number / 800 if number % 7 else 0.0)
    fractions = [frame.fraction for _, frame in sent]
    assert fractions == sorted(set(fractions))
    assert fractions[-1] == 1.0
    times = [at_s for at_s, _ in sent]
    assert min(later - at for at, later in itertools.pairwise(times)) > 0.099
    assert 70 < len(sent) <= 100
