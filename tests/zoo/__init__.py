"""Models to find activations in, and an independent witness of which activations really ran."""
