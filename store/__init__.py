"""The lake: schema, catalog and commits, reader, writer, snapshots, validation, errors."""
