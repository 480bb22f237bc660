"""A server that was reached and one side refused the other; what is wrong between two sides of TLS, in words.

Told apart by OpenSSL's codes and reasons, not by its texts.
"""

from __future__ import annotations

import ssl

from bus.errors import BusError

_EXPIRED, _NOT_YET_VALID, _SELF_SIGNED, _SELF_SIGNED_CHAIN = 10, 9, 18, 19
_UNKNOWN_ISSUER = (2, 20, 21)
_WRONG_NAME = (62, 64)
"""X509_V_ERR_…, as they stand in OpenSSL's x509_vfy.h."""

_NO_TLS = {"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG", "HTTP_REQUEST"}
_OURS_REFUSED = {
    "TLSV13_ALERT_CERTIFICATE_REQUIRED",
    "SSLV3_ALERT_BAD_CERTIFICATE",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED",
    "SSLV3_ALERT_CERTIFICATE_REVOKED",
    "TLSV1_ALERT_UNKNOWN_CA",
    "TLSV1_ALERT_ACCESS_DENIED",
}


class LinkRefused(BusError):
    """The broker was reached, and one side refused the other: a certificate, a login, a port that expects something
    else. Waiting does not help; settings have to change, here or there."""


def found_in(error: ssl.SSLError, *, trust: str) -> str:
    """What was found, and what to set. `trust`: the setting that names the certificates to trust."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _certificate(error, trust)
    if speaks_no_tls(error):
        return "what answers there speaks no TLS"
    return f"TLS could not be agreed on: {error.reason or error}"


def _certificate(error: ssl.SSLCertVerificationError, trust: str) -> str:
    match error.verify_code:
        case code if code == _EXPIRED:
            return "its certificate has expired; renew it there"
        case code if code == _NOT_YET_VALID:
            return "its certificate is not valid yet; look at the clocks of both sides"
        case code if code in (_SELF_SIGNED, _SELF_SIGNED_CHAIN):
            return f"its certificate is signed by itself, or by one that nobody here trusts; set {trust} to it if it is"
        case code if code in _UNKNOWN_ISSUER:
            return (
                f"its certificate is signed by one that is not trusted here; set {trust} to the certificates to trust"
            )
        case code if code in _WRONG_NAME:
            return f"its certificate is for another name ({error.verify_message}); use the name that it is for"
        case _:
            return f"its certificate is refused: {error.verify_message}; trusted is what {trust} says"


def speaks_no_tls(error: ssl.SSLError) -> bool:
    return error.reason in _NO_TLS


def refuses_ours(error: ssl.SSLError) -> bool:
    """Did the other side refuse our certificate, or want one and got none?"""
    return error.reason in _OURS_REFUSED
