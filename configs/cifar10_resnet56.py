"""ResNet-56 on CIFAR-10, FDG with K = 2.

    python train.py --config=configs/cifar10_resnet56.py --config.data_dir=DIR

K = 2 cut at block 14, beta = 0.5, schedule "reference" (staleness 1, 0); 300 epochs of
128-image batches with SGD, learning rate 0.1, divided by 10 at epochs 150, 225 and 275.

The paper's test error in percent ("rerun": by its authors; in brackets as published):

    K = 1  BP                6.19  rerun (6.97)
    K = 2  DDG               6.63  rerun (6.89)
    K = 2  DGL               6.77  rerun
    K = 2  FR                6.07  rerun
    K = 2  FDG, beta = 1.0   6.20
    K = 2  FDG, beta = 0.5   5.90
    K = 3  DDG               6.50  rerun
    K = 3  DGL               8.88  rerun
    K = 3  FR                6.33  rerun
    K = 3  FDG, beta = 1.0   6.20
    K = 3  FDG, beta = 0.5   6.08
    K = 4  DDG               6.61  rerun
    K = 4  DGL               9.65  rerun
    K = 4  FR                6.48  rerun
    K = 4  FDG, beta = 1.0   6.83
    K = 4  FDG, beta = 0.5   6.14
"""

from configs import default


def get_config():
    """Returns the config."""
    config = default.get_config()
    config.network = "resnet56"
    config.shrink = 0.5
    return config
