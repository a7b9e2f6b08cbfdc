"""The paper's table 6: seconds per epoch on CIFAR-10.

    python -m fdg_jax.study --study=configs/studies/table6.py --data_dir=DIR

Give every stage an accelerator of its own. Two epochs a run: the first steps, in which
programs are compiled, are not counted. Three runs each, since times vary.
"""

from fdg_jax.study import Study

RIVALS = ["ddg", "dgl", "dp", "fr"]


def get_study():
    """Returns the study."""
    networks = ["resnet56", "wrn28_10"]
    return Study(
        name="table6",
        base="default",
        overrides={"num_epochs": 2, "learning_rate_milestones": ()},
        grids=[
            {"method": "bp", "network": networks, "num_stages": 1},
            {"method": "fdg", "network": networks, "num_stages": [2, 3, 4]},
            {"method": RIVALS, "network": "resnet56", "num_stages": 2},
            {"method": RIVALS, "network": "wrn28_10", "num_stages": [2, 4]},
            {"method": ["ddg", "dgl", "fr"], "network": "wrn28_10", "num_stages": 3},
            # Three devices cannot share out 128 images equally.
            {
                "method": "dp",
                "network": "wrn28_10",
                "num_stages": 3,
                "batch_size": 126,
            },
        ],
        seeds=(0, 1, 2),
    )
