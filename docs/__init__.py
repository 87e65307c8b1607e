"""Beside the method: comparing models, drawing circuits, and pages of results."""
