"""How fast it is, measured beside PostgreSQL's own logical replication. `docs/performance.md` explains the figures."""
