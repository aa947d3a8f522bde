"""Subcommands of ``ds-pso``, a file each."""
