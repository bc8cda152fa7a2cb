"""Makes digits.npz, the file of the ``digits`` data set, from the scans that scikit-learn bundles.

    pip install scikit-learn && python -m gunn_ext.data.make_digits

Needed only to check or remake the file, never to use the package.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

TEST_IMAGES = 360
SEED = 0


def make_arrays() -> dict[str, Any]:
    """The arrays of the file: ``images (1797, 8, 8)`` and ``labels (1797,)`` uint8, ``test_indices (360,)`` int16."""
    import numpy
    from sklearn.datasets import load_digits  # type: ignore[import-not-found,import-untyped,unused-ignore]

    scans = load_digits()
    return {
        "images": scans.images.astype(numpy.uint8),
        "labels": scans.target.astype(numpy.uint8),
        "test_indices": numpy.array(stratified_test_indices(scans.target.tolist()), dtype=numpy.int16),
    }


def stratified_test_indices(labels: list[int]) -> list[int]:
    """Draw `TEST_IMAGES` images so that every class keeps its share, largest remainders rounded up."""
    by_class: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        by_class.setdefault(label, []).append(index)
    share = {label: len(members) * TEST_IMAGES / len(labels) for label, members in by_class.items()}
    quota = {label: int(share[label]) for label in sorted(share)}
    for label in sorted(share, key=lambda key: (quota[key] - share[key], key))[: TEST_IMAGES - sum(quota.values())]:
        quota[label] += 1
    draw = random.Random(SEED)
    return sorted(index for label in sorted(quota) for index in draw.sample(by_class[label], quota[label]))


def main() -> None:
    """Write the file beside this one."""
    import numpy

    target = Path(__file__).with_name("digits.npz")
    numpy.savez_compressed(target, **make_arrays())
    print(f"{target}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
