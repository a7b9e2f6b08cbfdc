"""ResNet-8 on scikit-learn's handwritten digits: FDG in half a minute on a laptop.

    python train.py

1,797 images of 8x8 pixels come with scikit-learn, so nothing is downloaded. K = 2, cut
at block 3, one thread per stage, schedule "reference" (staleness 1, 0), no shrinking.
For another K set the cuts too: --config.num_stages=4 --config.cuts=balanced.

Test accuracy 99.28 ± 0.32% (mean and sample deviation of seeds 0 to 4) after 8 s of
training, about 15 s in all, on 2 CPU cores (JAX 0.10.2, Flax 0.12.8).
"""

from configs import default


def get_config():
    """Returns the config."""
    config = default.get_config()
    config.network = "resnet8"
    config.dataset = "digits"
    config.cuts = "3"
    config.engine = "threads"
    config.batch_size = 64
    config.num_epochs = 20
    config.learning_rate = 0.1
    config.learning_rate_milestones = (14, 18)
    config.log_every_steps = 10
    return config
