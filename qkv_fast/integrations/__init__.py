"""Bridges to other libraries: each is a module to import by name, which imports its host then."""
