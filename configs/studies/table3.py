"""The paper's table 3: test error of ResNet-56 on CIFAR-10, K = 3 and 4.

    python -m fdg_jax.study --study=configs/studies/table3.py --data_dir=DIR

300 epochs each, three seeds.
"""

from fdg_jax.study import Study


def get_study():
    """Returns the study."""
    return Study(
        name="table3",
        base="cifar10_resnet56",
        overrides={"shrink": 1.0},
        grids=[
            {"method": ["ddg", "dgl", "fr"], "num_stages": [3, 4]},
            {"method": "fdg", "num_stages": [3, 4], "shrink": [1.0, 0.5]},
        ],
        seeds=(0, 1, 2),
    )
