"""Beside the method: comparing models, showing circuits, and pages of results."""
