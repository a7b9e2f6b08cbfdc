"""WRN-28-10 on CIFAR-10, FDG with K = 2.

    python train.py --config=configs/wrn28_10.py --config.data_dir=DIR

K = 2 cut at block 7, beta = 0.7, schedule "reference" (staleness 1, 0); 300 epochs of
128-image batches with SGD, learning rate 0.1, divided by 10 at epochs 150, 225 and 275.

The paper's test error in percent ("rerun": by its authors; in brackets as published):

    K = 1  BP                4.01  rerun (4.00)
    K = 2  FDG, beta = 1.0   4.13
    K = 2  FDG, beta = 0.7   3.85
"""

from configs import default


def get_config():
    """Returns the config."""
    config = default.get_config()
    config.network = "wrn28_10"
    config.shrink = 0.7
    return config
