"""A network between a client and an endpoint that loses things, ends TLS, or answers itself as proxies do."""

import datetime
import ipaddress
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

Fate = Literal["pass", "drop", "half", "502", "404", "silence"]
"""Of a connection: passed on; ended before anything is read; ended in the middle of the answer; answered in HTML by a
proxy whose server is gone, or in plain text by Ray's, which knows of no replica; never answered."""
PROXY = {
    "502": ("502 Bad Gateway", "<h1>gone</h1>\r\n"),
    "404": ("404 Not Found", "Path '/v1/align' not found. Ping http://.../-/routes for available routes."),
}


class WeakNetwork:
    """Listens on a port of its own; the n-th connection has the n-th fate, those after them are passed on."""

    def __init__(self, port: int, *fates: Fate, tls: ssl.SSLContext | None = None) -> None:
        self._target, self._fates, self._tls = port, list(fates), tls
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.connections += 1
                fate = self._fates.pop(0) if self._fates else "pass"
                threading.Thread(target=self._serve, args=(connection, fate), daemon=True).start()

    def _serve(self, connection: socket.socket, fate: Fate) -> None:
        with suppress(OSError):
            if self._tls:
                connection = self._tls.wrap_socket(connection, server_side=True)
            if fate in PROXY:
                connection.recv(65536)
                status, text = PROXY[fate]
                head = f"HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {len(text)}\r\n\r\n"
                connection.sendall((head + text).encode())
            elif fate == "silence":
                connection.settimeout(30)
                while connection.recv(65536):
                    pass
            elif fate != "drop":
                with socket.create_connection(("127.0.0.1", self._target)) as server:
                    threading.Thread(target=pump, args=(connection, server, None), daemon=True).start()
                    pump(server, connection, 300 if fate == "half" else None)
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)  # the other direction still reads from it
        connection.close()

    def close(self) -> None:
        self._listener.close()


def pump(source: socket.socket, sink: socket.socket, most: int | None) -> None:
    """Passes on what comes, `most` bytes of it."""
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data[:most])
            if most is not None:
                return


@contextmanager
def weak_network(port: int, *fates: Fate, tls: ssl.SSLContext | None = None) -> Iterator[WeakNetwork]:
    """One, closed when the block ends."""
    network = WeakNetwork(port, *fates, tls=tls)
    yield network
    network.close()


def certificate(folder: Path) -> tuple[ssl.SSLContext, Path]:
    """(a server's side, the certificate to trust) for 127.0.0.1, made for an hour."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    cert, secret = folder / "cert.pem", folder / "key.pem"
    cert.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    secret.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, secret)
    return context, cert
