"""Hold the adapters that run existing model code on the ops; each is imported by its own name."""
