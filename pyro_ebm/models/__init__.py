"""Model and guide pairs: ordinary Pyro programs, usable without the rest of the library."""
