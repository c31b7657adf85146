"""Batched, keyed, jitted 3D augmentation."""
