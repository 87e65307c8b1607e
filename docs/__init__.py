"""Beside the method: comparing models, showing circuits, and pages of results."""
import os

# BLAS reads these when NumPy is loaded, which has to be later. The threads are ours: see
# `sparsegpt.parallel`.
for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
