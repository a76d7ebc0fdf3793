"""The demo's server: this machine alone by default, and a page that can load nothing from elsewhere."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.terminal import tell
from vlmlab.demo.page import STYLE, Demo, build

if TYPE_CHECKING:
    import gradio as gr

MOST_BYTES = 2**28
"""Bytes of an uploaded file; what is in it is limited where images are read."""

FONTS = ["system-ui", "Segoe UI", "DejaVu Sans", "sans-serif"]
FIXED = ["ui-monospace", "DejaVu Sans Mono", "monospace"]

POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; connect-src 'self'; frame-ancestors 'none'; form-action 'self'; base-uri 'self'"
)
"""What a browser may load for the page: from this server alone."""

Scope = MutableMapping[str, Any]
Send = Callable[[Scope], Awaitable[None]]
App = Callable[[Scope, Callable[[], Awaitable[Scope]], Send], Awaitable[None]]


def serve(demo: Demo, host: str, port: int) -> None:
    """Serve the page until Ctrl-C; what was uploaded is deleted then.

    Raises:
        UserError: the address cannot be had.
    """
    with listen(host, port) as listening, tempfile.TemporaryDirectory(prefix="vlmlab-demo-") as uploads:
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": uploads}  # read as gradio is imported
        import uvicorn
        from fastapi import FastAPI

        app = mounted(FastAPI(openapi_url=None), build(demo))
        server = uvicorn.Server(uvicorn.Config(kept_here(app), log_level="error", timeout_graceful_shutdown=1))
        where = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
        tell(f"demo of {' and '.join(run.name for run in demo.runs)}: {where}  (Ctrl-C ends it)")
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn has shut down and says so once more
            server.run(sockets=[listening])
    tell("demo ended")


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address; port 0 is any that is free.

    Raises:
        UserError: it cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        why = (error.strerror or str(error)).partition(" (while")[0]
        raise UserError(
            f"host={host} port={port} cannot be listened at ({why}); give another port, or port=0 for any."
        ) from error


def mounted(app: Any, page: gr.Blocks) -> Any:
    """An application with the page at its root."""
    import gradio as gr

    theme = gr.themes.Default(font=FONTS, font_mono=FIXED)
    return gr.mount_gradio_app(
        app, page, path="/", footer_links=[], max_file_size=MOST_BYTES, ssr_mode=False, enable_monitoring=False,
        pwa=False, show_error=False, theme=theme, css=STYLE.read_text(encoding="utf-8"),
    )  # fmt: skip


def kept_here(app: App) -> App:
    """The application with `POLICY` on every answer."""

    async def kept(scope: Scope, receive: Callable[[], Awaitable[Scope]], send: Send) -> None:
        async def with_policy(message: Scope) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await app(scope, receive, with_policy)

    return kept
