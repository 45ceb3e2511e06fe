"""The lake: schema, catalog and commits, reader, writer, snapshots, validation, errors."""

import os

# A machine that falls silent closes no connection, and Ray would wait seven minutes for the answer of a task there,
# also where it has long declared the node dead. Now it asks after 90 s, and waits for 30: a node hangs up on who asks
# more often than once a minute. A task that was given up too early runs twice, which changes nothing. Ray reads this
# when it is imported.
os.environ.setdefault("RAY_grpc_client_keepalive_time_ms", "90000")
os.environ.setdefault("RAY_grpc_client_keepalive_timeout_ms", "30000")
