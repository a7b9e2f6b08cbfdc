"""Remedies for staleness: ResNet-20 on CIFAR-10, K = 2 and 3.

    python -m fdg_jax.study --study=configs/studies/remedies.py --data_dir=DIR

Each with the schedule "reference" and without shrinking, beside FDG's own remedy, which
is beta = 0.2. What each does stands in fdg_jax/remedies. 300 epochs each, three seeds.
"""

from fdg_jax.study import Study

REMEDIES = [
    *("staleness_aware", "weight_prediction", "spike_compensation"),
    *("nesterov_lookahead", "pipemare", "dc_asgd", "dc_asgd_adaptive"),
]


def get_study():
    """Returns the study."""
    return Study(
        name="remedies",
        base="cifar10_resnet20",
        overrides={"shrink": 1.0},
        grids=[
            {"method": "bp", "num_stages": 1},
            {"num_stages": [2, 3], "shrink": [1.0, 0.2]},
            {"num_stages": [2, 3], "remedy": REMEDIES},
        ],
        seeds=(0, 1, 2),
    )
