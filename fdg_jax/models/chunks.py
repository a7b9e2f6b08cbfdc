"""How many images at a time the CPU's convolutions work on."""

_ROWS = 512  # at least, so that adding a product to a large sum weighs little


def images_per_chunk(batch: int, rows: int, bytes_per_row: int, most: int) -> int:
    """A divisor of the batch: as many images as fit the cache, or as a product needs.

    Args:
      batch: images in all.
      rows: of the matrices that one image becomes.
      bytes_per_row: of all these matrices together.
      most: bytes of matrices at a time, a share of the cache.

    Returns:
      Images at a time. Their matrices fit that share, unless it leaves too few rows:
      every product is added to all of a kernel's gradient, or reads all of a kernel,
      which for many channels is larger than the images are.
    """
    fitting = most // (rows * bytes_per_row)
    largest = min(batch, max(fitting, _ROWS // rows, 1))
    return next(n for n in range(largest, 0, -1) if batch % n == 0)
