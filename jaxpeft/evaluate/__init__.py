"""Evaluation of a model from files: `python -m jaxpeft.evaluate`."""
