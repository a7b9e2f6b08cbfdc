"""ResNet-20 on CIFAR-10, FDG with K = 2.

    python train.py --config=configs/cifar10_resnet20.py --config.data_dir=DIR

K = 2 cut at block 5, beta = 0.2, schedule "reference" (staleness 1, 0); 300 epochs of
128-image batches with SGD, learning rate 0.1, divided by 10 at epochs 150, 225 and 275.

The paper's test error in percent ("rerun": by its authors; in brackets as published):

    K = 1  BP                7.78  rerun by the FDG authors (8.75 as first published)
    K = 2  FDG, beta = 1.0   7.92
    K = 2  FDG, beta = 0.2   7.23
"""

from configs import default


def get_config():
    """Returns the config."""
    config = default.get_config()
    config.network = "resnet20"
    config.shrink = 0.2
    return config
