"""moto's S3 server, which checks signatures, also of signed URLs: moto itself checks those in headers alone.

``python s3_app.py DESCRIPTOR PORT`` serves on a socket that listens already.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from botocore.auth import S3SigV4Auth, S3SigV4QueryAuth  # type: ignore[import-untyped]
from botocore.awsrequest import AWSRequest  # type: ignore[import-untyped]
from botocore.credentials import Credentials  # type: ignore[import-untyped]
from moto.iam.models import iam_backends
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

Environ = dict[str, Any]
Application = Callable[[Environ, Callable[..., Any]], Iterable[bytes]]


def with_signed_urls(inner: Application) -> Application:
    """Refuse a URL whose signature is wrong; sign the request's head instead where it is right."""

    def application(environ: Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        url = urlsplit(f"http://{environ['HTTP_HOST']}{environ['RAW_URI']}")
        query = dict(parse_qsl(url.query))
        if "X-Amz-Signature" not in query:
            return inner(environ, start_response)
        key_id, _, region, service, _ = query["X-Amz-Credential"].split("/")
        users = [user for found in iam_backends.values() for user in found["aws"].users.values()]
        keys = {key.access_key_id: key for user in users for key in user.access_keys}
        if key_id not in keys:
            return refuse(start_response)
        who = Credentials(key_id, keys[key_id].secret_access_key)
        signed, _, signature = url.query.rpartition("&X-Amz-Signature=")
        auth = S3SigV4QueryAuth(who, service, region)
        request = AWSRequest(environ["REQUEST_METHOD"], url._replace(query=signed).geturl())
        request.context["timestamp"] = query["X-Amz-Date"]
        expected = auth.signature(auth.string_to_sign(request, auth.canonical_request(request)), request)
        if signature != expected:
            return refuse(start_response)
        plain = AWSRequest(environ["REQUEST_METHOD"], url._replace(query="").geturl())
        S3SigV4Auth(who, service, region).add_auth(plain)
        heads = {f"HTTP_{name.upper().replace('-', '_')}": value for name, value in plain.headers.items()}
        unsigned = {"QUERY_STRING": "", "RAW_URI": url.path, "REQUEST_URI": url.path}
        return inner({**environ, **heads, **unsigned}, start_response)

    return application


def refuse(start_response: Callable[..., Any]) -> Iterable[bytes]:
    """As S3 does."""
    start_response("403 Forbidden", [("Content-Type", "application/xml")])
    return [b"<Error><Code>SignatureDoesNotMatch</Code></Error>"]


if __name__ == "__main__":
    app = with_signed_urls(DomainDispatcherApplication(create_backend_app))
    fd, port = map(int, sys.argv[1:])
    make_server("127.0.0.1", port, app, threaded=True, fd=fd).serve_forever()
