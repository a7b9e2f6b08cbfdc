"""The first row of the paper's table 1: ResNet-20 on CIFAR-10, K = 2, on one device.

    python -m fdg_jax.study --study=configs/studies/table1_first_row.py --data_dir=DIR

Back-propagation, and FDG with beta = 1 and 0.2; the paper has 7.78, 7.92 and 7.23 %.
300 epochs each; the three seeds of a setting are trained at the same time, as one
program, which suits an accelerator that one small network leaves idle.
"""

from fdg_jax.study import Study


def get_study():
    """Returns the study."""
    return Study(
        name="table1_first_row",
        base="cifar10_resnet20",
        overrides={"engine": "fused"},
        grids=[
            {"method": "bp", "num_stages": 1, "shrink": 1.0},
            {"method": "fdg", "num_stages": 2, "shrink": [1.0, 0.2]},
        ],
        seeds=(0, 1, 2),
        seeds_together=True,
    )
