"""The folder itself is on the path, whatever directory pytest is started from."""

import os
import sys
from pathlib import Path

# one thread: the arrays here are small, and waiting for a second core that is busy takes longer
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")
sys.path.insert(0, str(Path(__file__).parent.parent))
