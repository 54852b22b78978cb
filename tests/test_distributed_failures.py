"""DistributedLossWrapper(efficient="exact") where one rank of two dies."""

import failing_ranks


def test_a_rank_that_dies_is_an_error_for_the_other(ranks):
    (found,) = ranks(failing_ranks, 1)
    for of_call in found["errors"]:  # of backward, and of the next step
        assert of_call and of_call.startswith(("RuntimeError", "DistBackendError"))
    assert found["seconds"] < 6 * failing_ranks.TIMEOUT
