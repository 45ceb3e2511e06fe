"""Ingestion: sources are read, harmonised, checked and written into a lake, as resumable Ray tasks."""
