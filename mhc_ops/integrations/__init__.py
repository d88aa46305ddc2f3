"""Adapters that make existing model code run on the ops; each is imported by its own name."""
