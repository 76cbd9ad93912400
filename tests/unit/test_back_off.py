"""Pauses between tries that fail."""

from ray_app.core.back_off import back_off_s


def test_each_pause_is_twice_the_one_before_up_to_the_limit() -> None:
    assert [back_off_s(n, 30.0) for n in range(1, 8)] == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    assert back_off_s(3, 8.0, first_s=0.25) == 1.0
    assert back_off_s(10**6, 8.0) == 8.0
