"""Whole-case metrics and their statistics; conventions and sources stand in the docstrings."""
