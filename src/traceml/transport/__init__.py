"""What crosses TCP between ranks, clients and the aggregator; `docs/wire.md` describes it for other languages."""
