"""Data sets of the trainers: read from their official layouts or the hub, checked, turned into batches."""
