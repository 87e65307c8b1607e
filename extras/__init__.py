"""Beside the three programs: drawings, questions, comparisons, kernels for a GPU."""
