"""Models and heads of the vision-language side that transformers does not have."""
