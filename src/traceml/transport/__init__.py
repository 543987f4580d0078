"""Wire protocol between ranks, clients and the aggregator; `docs/wire.md` describes it for other languages.

The client side runs in the training process and in commands, the server side in the aggregator and the web page. May
import `database`.
"""
