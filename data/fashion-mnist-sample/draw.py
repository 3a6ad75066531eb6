#!/usr/bin/env python3
"""Draw the bundled sample from the four files of Fashion-MNIST.

    data/fashion-mnist-sample/draw.py FOLDER

FOLDER holds the files as Zalando publishes them, gzipped. The sample has the first 1,000 training
pictures and the first 200 test pictures of each class, in the order of the files, which is random.
It is written beside this script, the same bytes every time.
"""

import gzip
import sys
from pathlib import Path

import numpy as np


def draw(folder: Path, target: Path, name: str, per_class: int) -> None:
    """Write the first `per_class` pictures of each class, and their labels, to `target`."""
    images_name, labels_name = f"{name}-images-idx3-ubyte.gz", f"{name}-labels-idx1-ubyte.gz"
    images = np.frombuffer(
        gzip.decompress((folder / images_name).read_bytes()), np.uint8, offset=16
    )
    labels = np.frombuffer(gzip.decompress((folder / labels_name).read_bytes()), np.uint8, offset=8)
    kept = np.sort([i for k in range(10) for i in np.flatnonzero(labels == k)[:per_class]])
    for file, array in (
        (images_name, images.reshape(-1, 28, 28)[kept]),
        (labels_name, labels[kept]),
    ):
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
        with open(target / file, "wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as packed:
            packed.write(header + array.tobytes())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    for name, per_class in (("train", 1000), ("t10k", 200)):
        draw(Path(sys.argv[1]), Path(__file__).parent, name, per_class)
