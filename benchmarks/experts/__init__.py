"""What a search over experts is worth: eight or more experts of a small Llama, several targets, equal budgets."""
