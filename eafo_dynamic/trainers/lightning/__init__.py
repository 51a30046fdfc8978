"""The Lightning callback and what it needs of Lightning."""
