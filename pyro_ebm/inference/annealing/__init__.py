"""Paths from a distribution to a target: sequential Monte Carlo, annealed importance sampling, log Z."""
