"""Batched Markov kernels: state in, state and info out; and what tunes them."""
