"""Write digits.npz from scikit-learn's copy of the UCI handwritten digits.

pip install scikit-learn && python data/make_digits.py
"""

from pathlib import Path

import numpy as np

try:  # needed only to make the file anew
    from sklearn.datasets import load_digits
except ImportError:
    raise SystemExit("error: pip install scikit-learn first") from None

if __name__ == "__main__":
    source = load_digits()
    np.savez_compressed(
        Path(__file__).parent / "digits.npz",
        x=(source.images * 255 / 16).astype(np.uint8),  # they count 0 … 16 pixels
        y=source.target.astype(np.uint8),
    )
