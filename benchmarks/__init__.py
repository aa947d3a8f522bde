"""What the claims of this project rest on: one command for each table."""
