"""Whose filters a tensor carries, and where they lie: labels, and one rule per torch function."""
