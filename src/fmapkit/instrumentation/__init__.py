"""Hooks and call overrides: set, suspended and removed in one place."""
