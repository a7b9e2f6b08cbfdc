"""All that a laptop can say in 20 minutes: ResNet-8 on digits and on part of CIFAR-10.

    python -m fdg_jax.study --study=configs/studies/small.py --data_dir=DIR

1,437 images of digits for ten epochs, and 5,000 of CIFAR-10 for three; the latter says
how training starts, not where it ends. K = 2 and 3, three seeds.
"""

from fdg_jax.study import Study

CUTS = {1: "", 2: "3", 3: "2,3"}
"""By K; explicit, since cuts that are measured may come out differently each time."""

DIGITS = {
    "dataset": "digits",
    "batch_size": 64,
    "num_epochs": 10,
    "learning_rate_milestones": (7, 9),
    "log_every_steps": 11,
}
CIFAR = {
    "dataset": "cifar10",
    "num_train": 5000,
    "num_epochs": 3,
    "learning_rate_milestones": (2,),
    "log_every_steps": 13,
    "eval_every_epochs": 3,
}


def get_study():
    """Returns the study."""
    grids = []
    for data in (DIGITS, CIFAR):
        grids.append({"method": "bp", "num_stages": 1, "cuts": CUTS[1], **data})
        for num_stages in (2, 3):
            stages = {"num_stages": num_stages, "cuts": CUTS[num_stages], **data}
            delayed = {"schedule": "minimal", **stages}
            grids += [
                {"method": "ddg", "backward": "stored", **delayed},
                {"method": "fr", "backward": "replay", **delayed},
                {"method": "fdg", "shrink": [1.0, 0.5], **stages},
            ]
    return Study(
        name="small",
        base="default",
        overrides={"network": "resnet8"},
        grids=grids,
        seeds=(0, 1, 2),
    )
