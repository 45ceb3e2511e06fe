"""Ingestion: sources are read, harmonised, checked and written into a lake, as resumable Ray tasks."""

import store  # noqa: F401  before Ray, to which it says how soon to miss a node that fell silent
