"""Vision-language models and heads that transformers does not provide."""
