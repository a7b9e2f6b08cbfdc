"""Remedies for staleness: ResNet-20 on CIFAR-10, K = 2 and 3.

    python -m fdg_jax.study --study=configs/studies/remedies.py --data_dir=DIR

Each with the schedule "reference" and without shrinking, beside FDG's own remedy, which
is beta = 0.2. What each does stands in fdg_jax/remedies. 300 epochs each, three seeds.

"nesterov_lookahead" has the momentum of its paper, 0.99, and discounts gradients by
1 - 0.99, so that each moves the weights by the learning rate in all; 1.0 is as far as
momentum 0.9 takes the others' 0.1. "staleness_aware" divides by 1 where K = 2.
"""

from fdg_jax.study import Study

REMEDIES = [
    *("weight_prediction", "spike_compensation", "pipemare"),
    *("dc_asgd", "dc_asgd_adaptive"),
]
LOOKAHEAD = {"momentum": 0.99, "learning_rate": 1.0}

NOTE = (
    "nesterov_lookahead has momentum 0.99 and learning rate 1.0, with which a gradient "
    "moves the weights as far in all as with the others' 0.9 and 0.1. staleness_aware "
    "is run with K = 3 alone: with K = 2 no gradient is more than one update late, and "
    "it does nothing. weight_prediction is evaluated with the predicted weights, and "
    "nesterov_lookahead at the look-ahead point, which is what the stages hold."
)


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
            {"num_stages": [2, 3], "remedy": ["nesterov_lookahead"], **LOOKAHEAD},
            {"num_stages": 3, "remedy": ["staleness_aware"]},
        ],
        seeds=(0, 1, 2),
        note=NOTE,
    )
