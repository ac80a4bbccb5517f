"""The studio, a web app: its logic without the user interface. Only the subpackage `pages` imports Gradio."""
