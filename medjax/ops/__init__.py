"""Numerics on arrays: convolution, resampling, windows. Knows nothing of files, cases or tasks."""
