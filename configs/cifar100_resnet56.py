"""ResNet-56 on CIFAR-100, FDG with K = 2.

    python train.py --config=configs/cifar100_resnet56.py --config.data_dir=DIR

K = 2 cut at block 14, beta = 0.4, schedule "reference" (staleness 1, 0); 300 epochs of
128-image batches with SGD, learning rate 0.1, divided by 10 at epochs 150, 225 and 275.

The paper's test error in percent ("rerun": by its authors; in brackets as published):

    K = 1  BP               27.68  rerun (30.21)
    K = 2  DDG              28.44  rerun (29.83)
    K = 2  DGL              29.51  rerun
    K = 2  FR               28.39  rerun
    K = 2  FDG, beta = 1.0  27.87
    K = 2  FDG, beta = 0.4  27.49
"""

from configs import cifar10_resnet56


def get_config():
    """Returns the config."""
    config = cifar10_resnet56.get_config()
    config.dataset = "cifar100"
    config.shrink = 0.4
    return config
