"""Measurements of clipfast against the limit and against other implementations; results are kept in results/."""
