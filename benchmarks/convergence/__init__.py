"""How well the rules train, in grids of small runs."""
