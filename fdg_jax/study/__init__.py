"""Studies: a grid of runs, each resumable, and the tables and plots made of them.

python -m fdg_jax.study --study=configs/studies/small.py
"""

from fdg_jax.study.definition import Study, load

__all__ = ["Study", "load"]
