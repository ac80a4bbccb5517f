"""The APT pipelines; installed as `apt_diffusion.pipelines`."""
