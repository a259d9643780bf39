"""Tilts by constraint: an energy linear in features, fitted so that their means have given values."""
