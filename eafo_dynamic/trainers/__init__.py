"""The hosts of a training: Lightning, the Hugging Face Trainer, optimisers, several processes."""
