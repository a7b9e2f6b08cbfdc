"""How many images at a time the CPU's convolutions work on."""

import pytest

from fdg_jax.models.chunks import images_per_chunk


@pytest.mark.parametrize(
    "batch, rows, bytes_per_row, images",
    [
        (128, 1024, 2**9, 2),  # as many as fit
        (128, 64, 2**14, 8),  # more than fit: 512 rows
        (12, 64, 2**14, 6),  # a divisor of the batch
        (7, 1024, 2**20, 1),
    ],
)
def test_images_are_few_or_enough(batch, rows, bytes_per_row, images):
    assert images_per_chunk(batch, rows, bytes_per_row, 2**20) == images
