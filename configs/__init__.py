"""One file per experiment, each a few overrides of ``default.py``."""
