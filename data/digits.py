"""scikit-learn's bundled handwritten digits: 1,797 real 8x8 scans of 43 people (UCI, Alpaydin & Kaynak 1998)."""

from collections.abc import Callable
from functools import partial

import numpy as np
from PIL import Image

Item = tuple[str, Callable[[], Image.Image], int | None]
CLASSES = [str(digit) for digit in range(10)]


def digits() -> list[Item]:
    """Return (name, opener, class) of every scan, in the package's order; openers give 8x8 grey images."""
    from sklearn.datasets import load_digits

    scans, labels = load_digits(return_X_y=True)
    greys = np.rint(scans.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return [(f"digit-{i:04d}", partial(Image.fromarray, g), int(c)) for i, (g, c) in enumerate(zip(greys, labels))]
