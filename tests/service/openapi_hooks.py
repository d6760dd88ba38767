"""For schemathesis: a string of any bytes is valid by the schema, but only an image can be classified."""

from typing import Any

import schemathesis
from hypothesis import strategies as st

from service.running import encoded

IMAGES = [encoded(seed, kind=kind) for seed in range(3) for kind in ("PNG", "JPEG")]

for media_type in ("image/jpeg", "image/png", "image/webp", "application/octet-stream"):
    schemathesis.openapi.media_type(media_type, st.sampled_from(IMAGES))


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """Images in the fields of forms."""
    if isinstance(body, dict) and isinstance(body.get("file"), bytes):
        return body | {"file": IMAGES[0]}
    if isinstance(body, dict) and isinstance(body.get("files"), list):
        return body | {"files": [IMAGES[1] if isinstance(each, bytes) else each for each in body["files"]]}
    return body
