"""The application: HTTP on one side, the ledger and the providers on the other, an exchange for each request.

- `settings`: what the environment says.
- `gateway`: what all requests share, and its life from start to drain.
- `asgi`, `border`, `context`, `messages`, `origins`, `callers`: what every request passes.
- `chat`: the endpoint that costs money; `endpoints`: the others.
- `conduct`, `client_stream`: carry out what an exchange decides.
"""
