from collections.abc import Sequence

from typing_extensions import disjoint_base

from xvd.dataplane.back.options import Bucket

@disjoint_base
class Throttle:
    def configure(
        self, buckets: Sequence[Bucket], *, request_bytes: int = 0, now_ns: int | None = None
    ) -> None: ...
