"""Edits as they were asked for, where they are, and one of them carried out."""
