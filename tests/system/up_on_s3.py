"""`nbos up` whose daemons keep blobs in the S3 server at TEST_S3_ENDPOINT: `python -m tests.system.up_on_s3 up …`."""

from __future__ import annotations

import os
import sys
from typing import Any

from nbos import cli
from nbos.layout import Layout

OPTIONS = {
    "endpoint": os.environ["TEST_S3_ENDPOINT"],
    "region": "us-east-1",
    "access_key_id": "test",
    "secret_access_key": "test",
}


class OnS3(Layout):
    def daemon_config(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        found = super().daemon_config(*args, **kwargs)
        found["GPUDaemon"] |= {"blob_store": "s3://bucket/nbos", "blob_store_options": OPTIONS}
        return found


if __name__ == "__main__":
    from nbos import up

    up.Layout = OnS3  # type: ignore[misc]
    sys.exit(cli.main())
