"""Post-hoc EMA: an average of any width, reconstructed from snapshots of a few averages.

EDM2, Karras et al. 2023 (arXiv 2312.02696), section 3.
"""

import numpy as np

MAX_WIDTH = 12**-0.5  # of the plain mean, the power profile t^0


def exponent(width: float) -> float:
    """Return the exponent gamma of the profile t^gamma with a relative standard deviation `width`.

    EDM2, eq. 126.
    """
    if not 0 < width < MAX_WIDTH:
        raise ValueError(
            f"EMA width: {width}; it must lie in (0, {MAX_WIDTH:.4f}), the width of the plain mean"
        )
    polynomial = [1, 7, 16 - width**-2, 12 - width**-2]
    return float(np.roots(polynomial).real.max())


def inner_products(
    steps_a: np.ndarray, gammas_a: np.ndarray, steps_b: np.ndarray, gammas_b: np.ndarray
) -> np.ndarray:
    """Return the inner products, (a, b), of normalised profiles t^gamma on [0, step]."""
    s = steps_a[:, None]
    g = gammas_a[:, None]
    r = steps_b[None]
    h = gammas_b[None]
    ratio = s / r
    overlap = np.where(s < r, ratio**h, ratio**-g)
    return (g + 1) * (h + 1) / ((g + h + 1) * np.maximum(s, r)) * overlap


def posthoc_weights(steps: np.ndarray, gammas: np.ndarray, step: int, gamma: float) -> np.ndarray:
    """Return the weights of snapshots that approximate the profile `gamma` at `step` best.

    Args:
        steps: of the snapshots, (n,).
        gammas: exponents of the snapshots' profiles, (n,).
        step: at which the new profile ends.
        gamma: exponent of the new profile.

    Returns:
        Least-squares weights, (n,), divided by their sum, as in EDM2's code: of few snapshots it
        would be less than 1, and the average smaller than the weights.
    """
    gram = inner_products(steps, gammas, steps, gammas)
    target = inner_products(steps, gammas, np.array([float(step)]), np.array([gamma]))
    weights = np.linalg.lstsq(gram, target[:, 0], rcond=1e-12)[0]
    return weights / weights.sum()
