"""medjax: 3D medical images in JAX. Importing it is light; import the room you need (`medjax.models`...)."""

__version__ = "0.1.0"
