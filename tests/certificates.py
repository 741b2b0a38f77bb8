"""A certificate for this host, and the TLS contexts that are made from it."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path


class Contexts:
    """Makes the contexts of both sides from one certificate."""

    def __init__(self, certificate: Path) -> None:
        self.certificate = certificate

    def __call__(self, purpose: ssl.Purpose) -> ssl.SSLContext:
        if purpose is ssl.Purpose.CLIENT_AUTH:
            context = ssl.create_default_context(purpose)
            context.load_cert_chain(self.certificate)
        else:
            context = ssl.create_default_context(purpose, cafile=str(self.certificate))
        return context


def contexts(folder: Path) -> Contexts:
    """Those of a new certificate, for 127.0.0.1."""
    certificate, public = folder / "certificate.pem", folder / "public.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext",
         "subjectAltName=IP:127.0.0.1", "-keyout", certificate, "-out", public],
        check=True, capture_output=True,
    )  # fmt: skip
    certificate.write_bytes(certificate.read_bytes() + public.read_bytes())
    return Contexts(certificate)
