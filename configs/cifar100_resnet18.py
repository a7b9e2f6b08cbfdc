"""ResNet-18 on CIFAR-100, FDG with K = 2.

    python train.py --config=configs/cifar100_resnet18.py --config.data_dir=DIR

K = 2 cut at block 5, beta = 0.5, schedule "reference" (staleness 1, 0); 300 epochs of
128-image batches with SGD, learning rate 0.1, divided by 10 at epochs 150, 225 and 275.

The paper's test error in percent ("rerun": by its authors; in brackets as published):

    K = 1  BP               22.35  rerun
    K = 2  DDG              22.74  rerun
    K = 2  DGL              22.24  rerun
    K = 2  FR               22.88  rerun
    K = 2  FDG, beta = 1.0  22.78
    K = 2  FDG, beta = 0.5  22.18
"""

from configs import cifar10_resnet18


def get_config():
    """Returns the config."""
    config = cifar10_resnet18.get_config()
    config.dataset = "cifar100"
    config.shrink = 0.5
    return config
