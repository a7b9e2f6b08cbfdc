"""What two CPU cores can say in half an hour: all methods, digits, some of CIFAR-10.

    python -m fdg_jax.study --study=configs/studies/small.py --data_dir=DIR --jobs=2

ResNet-8 on the 1,437 training images of digits for eight epochs, and on 5,000 of
CIFAR-10 for two; the latter says how training starts, not where it ends. K = 2 and 3,
three seeds. Batches of 60 images, so that two, three and four can share them out.
"""

from fdg_jax.study import Study

CUTS = {2: "3", 3: "2,3"}
"""By K; explicit, since cuts that are measured may come out differently each time."""

OTHERS = ["dp", "pipedream", "ddg", "fr", "dgl", "adl"]

DIGITS = {
    "dataset": "digits",
    "num_epochs": 8,
    "learning_rate_milestones": (6,),
    "log_every_steps": 23,
}
CIFAR = {
    "dataset": "cifar10",
    "num_train": 5000,
    "num_epochs": 2,
    "learning_rate_milestones": (),
    "log_every_steps": 83,
}

NOTE = (
    "In docs/studies/small, CIFAR-10 was a copy whose images its publisher had "
    "re-encoded as JPEG: close to the original images, not the same. With --jobs=2 a "
    "run shares the cores with another one, whichever that is, so images/s and s/epoch "
    "are no measure of a method's speed."
)


def get_study():
    """Returns the study."""
    grids = []
    for data in (DIGITS, CIFAR):
        grids.append({"method": "bp", "num_stages": 1, "cuts": "", **data})
        for num_stages, cuts in CUTS.items():
            stages = {"num_stages": num_stages, "cuts": cuts, **data}
            grids += [
                {"method": OTHERS, **stages},
                {"method": "gpipe", "engine": "serial", **stages},
                {"method": "fdg", "shrink": [1.0, 0.5], **stages},
            ]
    return Study(
        name="small",
        base="default",
        # One device is as good as several where two runs share two cores.
        overrides={
            "engine": "fused",
            "network": "resnet8",
            "batch_size": 60,
            "learning_rate": 0.05,
        },
        grids=grids,
        seeds=(0, 1, 2),
        note=NOTE,
    )
