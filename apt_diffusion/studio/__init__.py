"""The studio in the browser: what stands behind its pages, testable without them. `pages` alone knows Gradio."""
