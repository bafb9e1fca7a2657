"""Imported once, by the process that every model's process is forked from."""

from .models import warm

warm()
