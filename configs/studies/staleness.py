"""Staleness against throughput and accuracy: ResNet-56 on CIFAR-10, K = 2 to 4.

    python -m fdg_jax.study --study=configs/studies/staleness.py --data_dir=DIR

More staleness hides more of the time that activations and cotangents take from stage to
stage, and makes gradients older. Without shrinking, so that staleness alone differs;
for K = 2 "minimal" and "reference" are the same. 300 epochs each, three seeds.
"""

from fdg_jax.study import Study


def get_study():
    """Returns the study."""
    schedules = ["minimal", "reference", "paper"]
    return Study(
        name="staleness",
        base="cifar10_resnet56",
        overrides={"shrink": 1.0},
        grids=[
            {"method": "bp", "num_stages": 1},
            {"num_stages": 2, "schedule": schedules[1:]},
            {"num_stages": [3, 4], "schedule": schedules},
        ],
        seeds=(0, 1, 2),
    )
