"""What the remedies ask of their numbers."""

import math

import optax


def check_staleness(staleness: int) -> None:
    """Refuses a staleness that is no number of updates.

    Raises:
        ValueError: it is negative.
    """
    if staleness < 0:
        raise ValueError(f"staleness counts updates, so it is >= 0; got {staleness}")


def check_momentum(momentum: float) -> None:
    """Refuses a momentum whose sums do not converge.

    Raises:
        ValueError: it lies outside [0, 1).
    """
    if not 0.0 <= momentum < 1.0:
        raise ValueError(f"momentum must lie in [0, 1); got {momentum}")


def check_strength(strength: float) -> None:
    """Refuses a strength of a delay compensation that is not one.

    Raises:
        ValueError: it is negative or not finite.
    """
    if not (strength >= 0.0 and math.isfinite(strength)):
        raise ValueError(
            f"the strength of a delay compensation (lambda) must be finite and >= 0; "
            f"got {strength}; 0 compensates nothing"
        )


def check_params(params: optax.Params | None) -> None:
    """Refuses a call of ``update`` without the parameters.

    Raises:
        ValueError: they are None.
    """
    if params is None:
        raise ValueError(
            "this remedy works on the parameters as well as on the gradients; got "
            "params=None; call update(updates, state, params)"
        )
