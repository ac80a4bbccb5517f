"""Training adapters for text-to-image models."""
