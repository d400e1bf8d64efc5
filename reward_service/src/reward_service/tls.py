"""TLS for `serve`: a certificate, and where wanted an authority for the certificates of clients (mTLS)."""

from __future__ import annotations

import asyncio
import ssl
from typing import Any

from reward_service.errors import StartError
from reward_service.settings import Settings

HANDSHAKE_DEADLINE_S = 5.0


def server_context(settings: Settings) -> ssl.SSLContext | None:
    """TLS 1.2 or later as `settings` describe it; None for plain HTTP.

    Raises:
        StartError: a file is missing, unfit, or not given at all.
    """
    if settings.tls_certificate is None:
        if settings.tls_key is not None or settings.tls_client_ca is not None:
            raise StartError(
                "tls_certificate: is missing; --tls-key and --tls-client-ca need --tls-certificate"
            )
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    try:
        # The password callback keeps an encrypted key from asking on the terminal.
        context.load_cert_chain(settings.tls_certificate, settings.tls_key, password=lambda: "")
    except (OSError, ValueError) as error:
        raise _unfit("tls_certificate and tls_key", error) from None
    if settings.tls_client_ca is not None:
        try:
            context.load_verify_locations(settings.tls_client_ca)
        except (OSError, ValueError) as error:
            raise _unfit("tls_client_ca", error) from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


class DeadlineLoop(asyncio.SelectorEventLoop):
    """An event loop whose servers give a TLS handshake a few seconds; asyncio would wait for a minute."""

    async def create_server(self, *arguments: Any, **options: Any) -> asyncio.Server:
        """As asyncio's, with a deadline for the handshake."""
        if options.get("ssl") is not None:
            options.setdefault("ssl_handshake_timeout", HANDSHAKE_DEADLINE_S)
        return await super().create_server(*arguments, **options)


def _unfit(name: str, error: Exception) -> StartError:
    why = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
    return StartError(
        f"{name}: cannot be used ({why}); give PEM files that belong together, the key unencrypted"
    )
