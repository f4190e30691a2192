"""The books: budgets, holds and charges in PostgreSQL, in exact integer pico-USD.

The ledger knows neither the proxy nor the operator; both know the ledger. Only `behest_ledger.store`
speaks to the database.
"""
