"""The provider simulator: an OpenAI-compatible server that says and breaks exactly what a request asks for.

It is a test instrument and says so: `system_fingerprint` is `behest-sim`, every answer carries
`x-behest-sim: 1`, and its text begins by saying that it is simulated.

`behaviour` is what a request may ask of it, `chat_request` what else it reads of a request, `text` its words,
`deltas` what a choice says, `answers` the whole answer as a sequence of steps. These are pure. `player` plays
steps on a wire at their pace, `http1` and `http2` are the wires, `records` remembers what happened, `routes`
chooses the answer, `server` listens.
"""
