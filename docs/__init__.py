"""Beside the method: what programs share, GPU kernels, showing and comparing circuits, pages."""
import os

# BLAS reads these when NumPy is loaded, which has to be later. The threads are ours: see
# `sparsegpt.parallel`.
for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
