"""Adapter files: names of tensors, reading, writing, saving and loading."""
