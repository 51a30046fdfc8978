"""Figures of logs and functions."""
