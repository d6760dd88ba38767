"""What a service is told: address, limits and timeouts."""

from dataclasses import dataclass

from vitrail.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Settings of a service. Sizes are bytes, times are seconds.

    host, port: where it listens; port 0 takes a free one. workers: processes. token: a bearer token that every request
    but those for the page and for health must have. origins: origins of other pages that may call the service (CORS).
    max_body: of a request. max_pixels: of an image. max_queue: images that may wait for the model or be computed.
    max_batch: images of a batch; None measures it at start. max_delay: how long a first image waits for others that
    are being decoded. header_timeout, body_timeout: for reading a request's header and body. decode_timeout: for an
    image. request_timeout: for a whole request. keep_alive: of an idle connection. drain_timeout: for the requests that
    are open when the service is stopped. max_connections: more are closed at once.
    access_log: a line for each request. cuda_graphs: record the model's passes once and replay them; on CUDA.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    token: str | None = None
    origins: tuple[str, ...] = ()
    max_body: int = 32 << 20
    max_body_memory: int = 256 << 20  # of all requests together
    max_pixels: int = 50_000_000
    max_queue: int = 256
    max_batch: int | None = None
    max_files: int = 64  # of one request
    max_delay: float = 0.004
    header_timeout: float = 10.0
    body_timeout: float = 30.0
    decode_timeout: float = 10.0
    request_timeout: float = 60.0
    keep_alive: float = 15.0
    drain_timeout: float = 9.0
    max_connections: int = 1024
    access_log: bool = True
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        for name, low, high in (
            ("port", 0, 65535),
            ("workers", 1, 256),
            ("max_body", 1, 1 << 31),
            ("max_pixels", 1, 178_956_970),
            ("max_queue", 1, 1_000_000),
            ("max_connections", 1, 1_000_000),
        ):
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"{name} must be {low} to {high:,}, not {getattr(self, name)}")
        if self.max_batch is not None and not 1 <= self.max_batch <= 1024:
            raise ConfigError(f"max_batch must be 1 to 1024, not {self.max_batch}")
        if self.token is not None and not (self.token and self.token.isascii() and self.token.isprintable()):
            raise ConfigError("the token must be printable ASCII and not empty")
        for origin in self.origins:
            scheme, _, rest = origin.partition("://")
            if scheme not in ("http", "https") or not rest or "/" in rest or "*" in rest:
                raise ConfigError(f"{origin!r} is not an origin: use https://example.org, with no path")
