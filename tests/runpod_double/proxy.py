"""RunPod's proxy: `https://<pod>-<port>.proxy.runpod.net` for those ports that a pod has asked for.

Clients come to it as to an HTTPS proxy of their own (`HTTPS_PROXY`), so that the addresses they use
are the real ones; what it shows them is a certificate of its own making (`SSL_CERT_FILE`).
"""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.runpod_double.pods import MachineRoom

DOMAIN = "proxy.runpod.net"
_HOST = re.compile(rf"CONNECT (?P<pod>\w+)-(?P<port>\d+)\.{re.escape(DOMAIN)}:443 ")
_NOT_FOUND = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class PodProxy:
    """The proxy; a context manager.

    Attributes:
        certificate: File with what clients have to trust.
    """

    def __init__(self, room: MachineRoom, folder: Path) -> None:
        self._room = room
        self.certificate, key = _certificate(folder)
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.load_cert_chain(self.certificate, key)
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}"

    def __enter__(self) -> PodProxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._server.accept()
                threading.Thread(target=self._serve, args=[connection], daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            asked = connection.recv(4096).decode()
            while not asked.endswith("\r\n\r\n"):
                asked += connection.recv(4096).decode()
            connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            with self._tls.wrap_socket(connection, server_side=True) as client:
                self._forward(client, asked)

    def _forward(self, client: ssl.SSLSocket, asked: str) -> None:
        found = _HOST.match(asked)
        pod = self._room.pods.get(found["pod"]) if found else None
        has_port = found and pod and f"{found['port']}/http" in pod.ports
        if found is None or pod is None or not has_port or pod.refresh().status != "RUNNING":
            client.recv(65536)
            client.sendall(_NOT_FOUND)
            return
        try:
            server = socket.create_connection(("127.0.0.1", int(found["port"])))
        except OSError:
            client.sendall(_NOT_FOUND.replace(b"404 Not Found", b"502 Bad Gateway"))
            return
        with server:
            back = threading.Thread(target=_copy, args=[server, client], daemon=True)
            back.start()
            _copy(client, server)
            back.join()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        for piece in _pieces(source):
            target.sendall(piece)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def _pieces(source: socket.socket) -> Iterator[bytes]:
    while piece := source.recv(65536):
        yield piece


def _certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for all pods, and its key, as files."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, DOMAIN)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(f"*.{DOMAIN}")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    paths = folder / "proxy.pem", folder / "proxy.key"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    paths[1].write_bytes(key.private_bytes(encoding, form, serialization.NoEncryption()))
    return paths
