"""diffusers pipelines with APT adapters."""
