"""The Kubernetes operator: it carries resources into the ledger, and what the ledger says back into their status."""
