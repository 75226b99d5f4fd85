"""The difference of two clocks is told from the time that passed between two looks."""

from datetime import UTC, datetime, timedelta

import pytest

from sync_pipeline.clocks import ClockDifference, Reading, warning

NOON = datetime(2030, 1, 1, 12, tzinfo=UTC)


def read(at_seconds: float, ahead_seconds: float, *, took_seconds: float = 0.0) -> Reading:
    half = took_seconds / 2
    clock = NOON + timedelta(seconds=at_seconds + ahead_seconds)
    return Reading(at_seconds - half, at_seconds + half, clock)


@pytest.mark.parametrize("ahead", [-7.5, 0.0, 7.5])
def test_time_that_passes_between_two_readings_is_no_difference(ahead: float) -> None:
    difference = read(10, 0).difference(read(400, ahead))
    assert difference is not None
    assert difference.seconds == pytest.approx(ahead)
    assert difference.accuracy_seconds == 0


def test_a_slow_reading_makes_the_difference_less_certain() -> None:
    difference = read(10, 0, took_seconds=4).difference(read(20, 7, took_seconds=2))
    assert difference is not None
    assert difference.seconds == pytest.approx(7)
    assert difference.accuracy_seconds == pytest.approx(3)
    assert difference.exceeds(3.9)
    assert not difference.exceeds(4.1)


def test_a_clock_that_was_not_read_has_no_difference() -> None:
    assert read(10, 0).difference(Reading(1, 2)) is None


@pytest.mark.parametrize(("seconds", "ahead"), [(9.0, "billing"), (-9.0, "crm")])
def test_the_warning_names_the_clock_that_is_ahead(seconds: float, ahead: str) -> None:
    text = warning("crm", "billing", ClockDifference(seconds, 0.1), 5)
    assert text.startswith(f"the clock of {ahead} is more than 5 s ahead")
