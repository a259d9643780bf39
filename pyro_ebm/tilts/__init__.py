"""Tilts of a site of a model or of a distribution, and their normalizing constants."""
