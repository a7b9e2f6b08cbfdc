"""Which weights the backward sees: ResNet-20 on CIFAR-10, K = 2 and 3.

    python -m fdg_jax.study --study=configs/studies/backward_modes.py --data_dir=DIR

"stored" is the paper's equations; the authors' program mixed old activations with new
weights, to which "replay" comes closest. "recompute" gives the gradients of "stored" up
to rounding, and differs in memory and speed. 300 epochs each, three seeds.
"""

from fdg_jax.study import Study


def get_study():
    """Returns the study."""
    return Study(
        name="backward_modes",
        base="cifar10_resnet20",
        grids=[
            {"method": "bp", "num_stages": 1, "shrink": 1.0},
            {
                "num_stages": [2, 3],
                "shrink": [1.0, 0.2],
                "backward": ["stored", "recompute", "replay"],
            },
        ],
        seeds=(0, 1, 2),
    )
