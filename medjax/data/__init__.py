"""From files to batches. The only room that may import TensorFlow (lazily, inside `pipeline`)."""
