"""Corrections in a model and out of it again."""
