"""Handwritten digits that come with scikit-learn: real images, no download."""

import numpy as np

from fdg_jax.data.dataset import Dataset, Split


def load() -> Dataset:
    """Loads the 1797 images of 8x8 pixels as a data set of 10 classes.

    scikit-learn's values 0 to 16 are multiplied by 15 to fill the range of uint8. The
    split is fixed and stratified: 1437 images to train, 360 to test.

    Returns:
      The data set `digits`, images [N, 8, 8, 1], with crops by one pixel and no flips
      (a mirrored digit is another sign).

    Raises:
      ValueError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets, model_selection
    except ImportError as error:
        raise ValueError(
            "the data set digits comes with scikit-learn, which is not installed: "
            "pip install scikit-learn"
        ) from error
    bunch = datasets.load_digits()
    train_images, test_images, train_labels, test_labels = (
        model_selection.train_test_split(
            (bunch.images * 15).astype(np.uint8)[..., np.newaxis],
            bunch.target.astype(np.int32),
            test_size=360,
            random_state=0,
            stratify=bunch.target,
        )
    )
    return Dataset(
        name="digits",
        train=Split(train_images, train_labels),
        test=Split(test_images, test_labels),
        num_classes=10,
        padding=1,
        flip=False,
    )
