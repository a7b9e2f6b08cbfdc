"""Which keys a config may have, and of what type: those of the default config."""

from collections.abc import Mapping
from typing import Any

import ml_collections

from fdg_jax.words import did_you_mean


def check(key: str, keys: list[str]) -> None:
    """Refuses a key that there is not.

    Args:
        key: what the user wrote.
        keys: the valid ones.

    Raises:
        ValueError: it is not among them.
    """
    if key not in keys:
        raise ValueError(
            f"unknown config key {key!r}{did_you_mean(key, keys)}; the keys are "
            f"{', '.join(keys)}"
        )


def complete(
    default: ml_collections.ConfigDict, changes: Mapping[str, Any], source: object
) -> ml_collections.ConfigDict:
    """Returns a config with the values of another, or of a dict, all of the right type.

    Args:
        default: a config with every key; left as it is.
        changes: key to value.
        source: where the changes come from, for the messages.

    Raises:
        ValueError: a key is unknown, a value has the wrong type, or is missing.
    """
    config = ml_collections.ConfigDict(default)
    for key in changes:
        check(key, list(default))
    try:
        config.update(changes)
    except TypeError as error:
        raise ValueError(f"a value in {source} has the wrong type: {error}") from error
    for key, value in default.items():
        if value is not None and config[key] is None:
            raise ValueError(f"{key} in {source} must have a value; got None")
    return config
