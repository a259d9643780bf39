"""Models and callables as batched log densities, which is all that samplers see."""
