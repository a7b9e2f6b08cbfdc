import numpy as np
import pytest

from fdg_jax import words


def test_a_near_miss_is_named_and_a_far_one_is_not():
    assert words.did_you_mean("thread", ["serial", "threads"]) == (
        "; did you mean 'threads'?"
    )
    assert words.did_you_mean("xyz", ["serial", "threads"]) == ""
    assert words.did_you_mean(None, ["serial"]) == ""


@pytest.mark.parametrize("text", ["4,7", "(4, 7)", "[4,7]", "4,7,", (4, 7)])
def test_lists_of_integers_are_read(text):
    assert words.parse_integers(text) == (4, 7)


def test_one_integer_is_a_list_of_one():
    assert words.parse_integers("-4") == words.parse_integers(-4) == (-4,)


@pytest.mark.parametrize("text", ["", "a", "[4", "4.0", "4,x", "{[]:1}", None])
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError):
        words.parse_integers(text)


def test_arrays_are_described_by_type_and_shape():
    values = {"a": np.zeros((4, 6), np.float32), "b": np.zeros((), np.int32)}
    assert words.describe(values) == "float32[4,6], int32[]"
    assert words.describe((None, {})) == "no arrays"


def test_positions_in_a_row_are_told_as_one():
    assert words.describe_positions([1, 3, 4, 5, 8, 9]) == "1, 3-5, 8-9"
    assert words.describe_positions([]) == ""
