"""The paper's table 6: seconds per epoch on CIFAR-10.

    python -m fdg_jax.study --study=configs/studies/table6.py --data_dir=DIR

Give every stage an accelerator of its own. Two epochs a run: the first steps, in which
programs are compiled, are not counted. Three runs each, since times vary.
"""

from fdg_jax.study import Study


def get_study():
    """Returns the study."""
    networks, delayed = ["resnet56", "wrn28_10"], {"schedule": "minimal"}
    return Study(
        name="table6",
        base="default",
        overrides={"num_epochs": 2, "learning_rate_milestones": ()},
        grids=[
            {"method": "bp", "network": networks, "num_stages": 1},
            {"method": "fdg", "network": networks, "num_stages": [2, 3, 4]},
            *(
                {"network": "resnet56", "num_stages": 2, **delayed, **method}
                | {"method": name}
                for name, method in _RIVALS.items()
            ),
            *(
                {"network": "wrn28_10", "num_stages": [2, 3, 4], **delayed, **method}
                | {"method": name}
                for name, method in _RIVALS.items()
            ),
        ],
        seeds=(0, 1, 2),
    )


_RIVALS = {"ddg": {"backward": "stored"}, "fr": {"backward": "replay"}}
