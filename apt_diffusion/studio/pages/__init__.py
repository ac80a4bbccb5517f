"""The user interface in Gradio. The logic is in the parent package."""
