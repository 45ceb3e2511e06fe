"""Ask whether what runs in this container is well; end with 0 or 1.

Without ``SOMAFLOW_HEALTH_URL`` the agent of this Ray node is asked, head or worker, which asks its raylet.
"""

from __future__ import annotations

import os
import sys
from urllib.error import URLError
from urllib.request import urlopen

NODE = "http://127.0.0.1:52365/api/local_raylet_healthz"

url = os.environ.get("SOMAFLOW_HEALTH_URL", NODE)
if not url.startswith("http"):
    sys.exit(f"SOMAFLOW_HEALTH_URL={url}: an address that begins with http is needed")
try:
    with urlopen(url, timeout=8) as answer:  # noqa: S310 - http, see above
        print(answer.read(200).decode(errors="replace"))
except (URLError, OSError) as error:
    sys.exit(f"{url}: {error}")
