"""Serving many adapters from one base model."""
