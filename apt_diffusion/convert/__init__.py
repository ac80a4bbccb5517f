"""Official checkpoints of METER, ViLT and APT, turned into transformers-style folders and adapter files.

`python -m apt_diffusion.convert --help` is the command, `conversion.convert` the function.
"""
