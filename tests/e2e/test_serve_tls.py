"""`ray-app serve --tls-cert --tls-key`: HTTPS alone, with the certificate that was given."""

import datetime
import http.client
import ipaddress
import json
import os
import signal
import ssl
from pathlib import Path

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from endpoints import INFER, WIDTH, RayServer, binary_request, make_checkpoint

BODY, HEADERS = binary_request(np.full((2, WIDTH), 0.5))


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """(certificate, key) of 127.0.0.1, signed by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    host = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
    made = made.not_valid_before(now - datetime.timedelta(hours=1)).not_valid_after(now + datetime.timedelta(hours=1))
    signed = made.add_extension(host, critical=False).sign(key, hashes.SHA256())
    cert_file, key_file = folder / f"{name}.pem", folder / f"{name}.key"
    cert_file.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    key_file.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))
    return cert_file, key_file


def test_a_client_that_verifies_is_answered_and_no_one_in_plain_text(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path, "endpoint")
    flags = ("--tls-cert", str(cert), "--tls-key", str(key))
    server = RayServer(str(make_checkpoint(tmp_path / "checkpoint")), *flags, own_group=True)
    try:
        assert any(f"https://127.0.0.1:{server.port}" in line for line in server.said)
        trusting = ssl.create_default_context(cafile=str(cert))
        connection = http.client.HTTPSConnection("127.0.0.1", server.port, context=trusting, timeout=30)
        connection.request("POST", INFER, BODY, HEADERS)
        answer = connection.getresponse()
        assert answer.status == 200
        assert len(answer.read()) > 2 * WIDTH * 4
        connection.request("GET", "/v2/health/ready")
        answer = connection.getresponse()
        assert (answer.status, json.loads(answer.read())) == (200, {"ready": True})
        connection.close()
        other = ssl.create_default_context(cafile=str(certificate(tmp_path, "other")[0]))
        with pytest.raises(ssl.SSLCertVerificationError):
            http.client.HTTPSConnection("127.0.0.1", server.port, context=other, timeout=30).request("GET", "/v2")
        with pytest.raises(OSError):
            server.ask("GET", "/v2/health/ready")
    finally:
        os.killpg(server.process.pid, signal.SIGTERM)  # as a shell or a container ends a group: Ray's head goes too
    assert server.process.wait(400) == 0
