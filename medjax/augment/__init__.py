"""Batched, keyed, jitted 3D augmentation: `policy.build` makes it from a config. See docs/augmentation.md."""
