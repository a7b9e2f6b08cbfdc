"""ResNet-1202 on CIFAR-10, FDG with K = 2.

    python train.py --config=configs/cifar10_resnet1202.py --config.data_dir=DIR

K = 2 cut at block 251, beta = 0.7, schedule "reference" (staleness 1, 0); 300 epochs of
128-image batches with SGD, learning rate 0.1, divided by 10 at epochs 150, 225 and 275.

The paper's test error in percent ("rerun": by its authors; in brackets as published):

    K = 1  BP                5.53  rerun (7.93); printed as WRN-28-10, 19.4M
    K = 2  FDG, beta = 1.0   5.50
    K = 2  FDG, beta = 0.7   5.49
"""

from configs import default


def get_config():
    """Returns the config."""
    config = default.get_config()
    config.network = "resnet1202"
    config.shrink = 0.7
    return config
