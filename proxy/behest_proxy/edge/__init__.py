"""The server edge: HTTP/1.1 and HTTP/2 to ASGI, with synchronous direct writes for streams."""
