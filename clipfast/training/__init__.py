"""Training CLIP for real: the run, and what guards its folder."""
