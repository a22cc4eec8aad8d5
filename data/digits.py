"""scikit-learn's bundled handwritten digits (UCI, Alpaydin & Kaynak 1998).

They are 1,797 scans of 8x8 pixels, written by 43 people.
"""

from functools import partial

import numpy as np
from PIL import Image

from data.images import LazyImage

DIGIT_CLASSES = [str(digit) for digit in range(10)]


def digits() -> list[LazyImage]:
    """Return all scans, as grey images of 8x8 pixels, in the order of scikit-learn."""
    from sklearn.datasets import load_digits

    scans, labels = load_digits(return_X_y=True)
    levels = scans.reshape(-1, 8, 8) * (255 / 16)
    pixels = np.rint(levels).astype(np.uint8)
    images = []
    for i, (image, label) in enumerate(zip(pixels, labels)):
        images.append(LazyImage(f"digit-{i:04d}", partial(Image.fromarray, image), int(label)))
    return images
