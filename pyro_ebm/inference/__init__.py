"""Samplers and exact references; every one returns :class:`~pyro_ebm.inference.draws.Draws`."""
