"""The paper's table 1: test error on CIFAR-10, K = 2.

    python -m fdg_jax.study --study=configs/studies/table1.py --data_dir=DIR

Back-propagation, DDG, DGL, Features Replay and FDG with and without shrinking, on all
networks of the table: 300 epochs each, three seeds. Remove networks to make it shorter.
"""

from fdg_jax.study import Study

BETAS = {
    "resnet20": 0.2,
    "resnet56": 0.5,
    "resnet110": 0.5,
    "resnet18": 0.8,
    "resnet1202": 0.7,
    "wrn28_10": 0.7,
}
"""By network, the paper's factor; cuts are the paper's too."""

RIVALS = ("resnet56", "resnet110", "resnet18")
"""Networks on which the paper has other decoupled methods."""


def get_study():
    """Returns the study."""
    networks, rivals = list(BETAS), list(RIVALS)
    return Study(
        name="table1",
        base="default",
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
