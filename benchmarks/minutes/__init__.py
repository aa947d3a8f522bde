"""Held-out loss over minutes: the same Llama for the same time over a slow link, in each stack."""
