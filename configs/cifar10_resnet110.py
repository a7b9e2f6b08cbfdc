"""ResNet-110 on CIFAR-10, FDG with K = 2.

    python train.py --config=configs/cifar10_resnet110.py --config.data_dir=DIR

K = 2 cut at block 28, beta = 0.5, schedule "reference" (staleness 1, 0); 300 epochs of
128-image batches with SGD, learning rate 0.1, divided by 10 at epochs 150, 225 and 275.

The paper's test error in percent ("rerun": by its authors; in brackets as published):

    K = 1  BP                5.79  rerun (6.41)
    K = 2  DDG               6.26  rerun (6.59)
    K = 2  DGL               6.26  rerun (6.50)
    K = 2  FR                5.76  rerun
    K = 2  FDG, beta = 1.0   5.79
    K = 2  FDG, beta = 0.5   5.73
"""

from configs import default


def get_config():
    """Returns the config."""
    config = default.get_config()
    config.network = "resnet110"
    config.shrink = 0.5
    return config
