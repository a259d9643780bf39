"""What a tilt or an energy is trained with, beyond Pyro's own ELBOs."""
