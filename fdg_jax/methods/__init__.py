"""Methods of decoupled training by name, one file each."""

from fdg_jax.methods import adl, bp, ddg, dgl, dp, fdg, fr, gpipe, pipedream
from fdg_jax.methods.method import AUTO, Method
from fdg_jax.words import did_you_mean

METHODS = {
    module.METHOD.name: module.METHOD
    for module in (bp, dp, gpipe, pipedream, ddg, fr, dgl, adl, fdg)
}


def get(name: str) -> Method:
    """Returns a method by name.

    ``fdg.Pipeline(network, ..., **fdg.methods.get("ddg").arguments(num_stages=2))``

    Raises:
        ValueError: there is none of that name.
    """
    if name not in METHODS:
        raise ValueError(
            f"method must be one of {', '.join(METHODS)}; got {name!r}"
            f"{did_you_mean(name, METHODS)}"
        )
    return METHODS[name]


__all__ = ["AUTO", "METHODS", "Method", "get"]
