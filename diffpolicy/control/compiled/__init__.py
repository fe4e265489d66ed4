"""Plans in a control period: compiled, measured, and exported to files that need no torch."""
