"""Vision-language tasks of the drawn world: questions, statements about two pictures, captions to find, classes.

`python -m apt_diffusion.miniature.tasks --help` writes them to disk in the layouts of the real data sets; see
docs/miniature.md.
"""
