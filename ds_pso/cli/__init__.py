"""The command ``ds-pso``: arguments, and what to print. Must not know engines or process groups."""
