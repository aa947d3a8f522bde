"""Held-out loss over bytes: what each lever of low-communication training is worth, at its own best learning rate."""
