"""Markov chains from start to draws: ours, and Pyro's own."""
