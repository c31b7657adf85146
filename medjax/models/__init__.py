"""Backbones (one file a family, each returns a feature pyramid) and heads."""
