"""ResNet-18 on CIFAR-10, FDG with K = 2.

    python train.py --config=configs/cifar10_resnet18.py --config.data_dir=DIR

K = 2 cut at block 5, beta = 0.8, schedule "reference" (staleness 1, 0); 300 epochs of
128-image batches with SGD, learning rate 0.1, divided by 10 at epochs 150, 225 and 275.

The paper's test error in percent ("rerun": by its authors; in brackets as published):

    K = 1  BP                4.87  rerun (6.48)
    K = 2  DDG               5.00  rerun
    K = 2  DGL               5.21  rerun
    K = 2  FR                4.80  rerun
    K = 2  FDG, beta = 1.0   4.82
    K = 2  FDG, beta = 0.8   4.79
"""

from configs import default


def get_config():
    """Returns the config."""
    config = default.get_config()
    config.network = "resnet18"
    config.shrink = 0.8
    return config
