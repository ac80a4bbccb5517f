"""The methods that APT is compared with, on ViLT, METER and CLIP: attached, frozen, saved and removed like APT."""
