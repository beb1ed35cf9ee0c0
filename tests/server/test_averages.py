import numpy as np

from fedspine_server.aggregation.averages import moved_towards, on_scale_of, weighted_mean

NAN = np.nan


def test_the_mean_is_weighted_and_skips_what_was_not_measured():
    mean = weighted_mean([np.array([1.0, NAN, NAN]), np.array([5.0, 3.0, NAN])], [1.0, 3.0])
    np.testing.assert_allclose(mean, [4.0, 3.0, NAN])


def test_the_average_moves_by_its_gain_and_takes_the_known_one_where_the_other_is_unknown():
    moved = moved_towards(np.array([2.0, NAN, 7.0, NAN]), np.array([4.0, 5.0, NAN, NAN]), 0.25)
    np.testing.assert_allclose(moved, [2.5, 5.0, 7.0, NAN])
    assert moved.dtype == np.float32


def test_importances_are_brought_to_the_scale_of_the_members_both_know():
    scaled = on_scale_of(np.array([1.0, 2.0, 9.0]), np.array([4.0, 8.0, NAN]))
    np.testing.assert_allclose(scaled, [1.0, 2.0, NAN])


def test_importances_stay_as_they_are_when_nothing_is_known_in_common():
    np.testing.assert_allclose(on_scale_of(np.array([NAN, 2.0]), np.array([4.0, NAN])), [4.0, NAN])
