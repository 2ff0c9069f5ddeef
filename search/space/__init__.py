"""Parameters to plans that meet their budget."""
