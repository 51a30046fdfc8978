"""Which activation calls a model makes, and which of them are hidden activations."""
