"""The one part that speaks to PostgreSQL: every other module of the ledger is plain values and rules.

`pool` opens it, `errors` maps its faults, `migrate` builds the schema, `holds` admits, extends and settles,
`writer` batches settlements, `credit` batches extensions, `reports` reads, `configuration`, `prices` and `identity`
keep what is configured.
"""
