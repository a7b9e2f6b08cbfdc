"""ResNet-110 on CIFAR-100, FDG with K = 2.

    python train.py --config=configs/cifar100_resnet110.py --config.data_dir=DIR

K = 2 cut at block 28, beta = 0.5, schedule "reference" (staleness 1, 0); 300 epochs of
128-image batches with SGD, learning rate 0.1, divided by 10 at epochs 150, 225 and 275.

The paper's test error in percent ("rerun": by its authors; in brackets as published):

    K = 1  BP               25.82  rerun (28.10)
    K = 2  DDG              27.16  rerun (28.61)
    K = 2  DGL              26.80  rerun
    K = 2  FR               26.31  rerun
    K = 2  FDG, beta = 1.0  25.73
    K = 2  FDG, beta = 0.5  25.43
"""

from configs import cifar10_resnet110


def get_config():
    """Returns the config."""
    config = cifar10_resnet110.get_config()
    config.dataset = "cifar100"
    config.shrink = 0.5
    return config
