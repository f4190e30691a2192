"""What is measured and told: metrics, spans and logs. Never billed from: the books are the truth.

- `names` has every name, unit, attribute and bucket; `docs/telemetry.md` is made from it.
- `meter` counts, in this process, with bounded sets of series.
- `prometheus` shows it to whoever asks, `otlp` pushes it and the spans to a collector, `settings` reads `OTEL_*`.
- `spans` makes spans, at the end of what they tell of; `logs` writes lines, one JSON object each where wanted.

OpenTelemetry's SDK gives the data model, the exporters, the resource and the sampler, and is loaded only where
something is pushed. Its instruments are not used: each costs 12 µs a call, and a request has fifteen.
"""
