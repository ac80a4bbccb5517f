"""The pages: Gradio and nothing else. What they do stands in the modules above."""
