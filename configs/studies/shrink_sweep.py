"""Test error over beta: ResNet-20 on CIFAR-10, K = 2 and 3.

    python -m fdg_jax.study --study=configs/studies/shrink_sweep.py --data_dir=DIR

The paper chose beta = 0.2 for this network at K = 2. 300 epochs each, three seeds.
"""

from fdg_jax.study import Study


def get_study():
    """Returns the study."""
    betas = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    return Study(
        name="shrink_sweep",
        base="cifar10_resnet20",
        grids=[
            {"method": "bp", "num_stages": 1, "shrink": 1.0},
            {"method": "fdg", "num_stages": [2, 3], "shrink": betas},
        ],
        seeds=(0, 1, 2),
    )
