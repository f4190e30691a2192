"""What an operator of the gateway writes down: manifests, their rules, the pure plan, and routing by them.

Everything here is pure: text and stored rows come in, typed values and changes go out. The
Kubernetes operator and `behest apply` call the same functions; `behest_ledger.store.configuration` reads and
writes the rows.
"""
