"""Whether to trust the draws: ArviZ trees, comparison tables, class balance."""
