"""Drivers written once: each one source file that knows no memory kind, no alignment and no back end."""
