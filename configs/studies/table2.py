"""The paper's table 2: test error on CIFAR-100, K = 2.

    python -m fdg_jax.study --study=configs/studies/table2.py --data_dir=DIR

As table 1, on the networks that table 2 has: 300 epochs each, three seeds.
"""

from fdg_jax.study import Study

BETAS = {"resnet56": 0.4, "resnet110": 0.5, "resnet18": 0.5, "wrn28_10": 0.6}
"""By network, the paper's factor; cuts are the paper's too."""

RIVALS = ("resnet56", "resnet110", "resnet18")
"""Networks on which the paper has other decoupled methods."""


def get_study():
    """Returns the study."""
    networks, rivals = list(BETAS), list(RIVALS)
    return Study(
        name="table2",
        base="default",
        overrides={"dataset": "cifar100"},
        grids=[
            {"method": "bp", "network": networks, "num_stages": 1},
            {"method": ["ddg", "dgl", "fr"], "network": rivals, "num_stages": 2},
            {"method": "fdg", "network": networks, "num_stages": 2, "shrink": 1.0},
            *(
                {"method": "fdg", "network": name, "num_stages": 2, "shrink": beta}
                for name, beta in BETAS.items()
            ),
        ],
        seeds=(0, 1, 2),
    )
