"""Whole jobs as one function each, used by the command line and the notebooks alike."""
