"""Official checkpoints of METER, ViLT and APT, turned into transformers-style folders and adapter files.

Run `python -m apt_diffusion.convert --help`, or call `conversion.convert`.
"""
