"""WRN-28-10 on CIFAR-100, FDG with K = 2.

    python train.py --config=configs/cifar100_wrn28_10.py --config.data_dir=DIR

K = 2 cut at block 7, beta = 0.6, schedule "reference" (staleness 1, 0); 300 epochs of
128-image batches with SGD, learning rate 0.1, divided by 10 at epochs 150, 225 and 275.

The paper's test error in percent ("rerun": by its authors; in brackets as published):

    K = 1  BP                19.6  rerun (19.2)
    K = 2  FDG, beta = 1.0  20.28
    K = 2  FDG, beta = 0.6  19.08
"""

from configs import wrn28_10


def get_config():
    """Returns the config."""
    config = wrn28_10.get_config()
    config.dataset = "cifar100"
    config.shrink = 0.6
    return config
