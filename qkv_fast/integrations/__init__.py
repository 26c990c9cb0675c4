"""Bridges to other libraries. Each is a module to import by name, and imports its host then; the package imports none."""
