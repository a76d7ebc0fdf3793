"""``qformer``, ``instruct_qformer``: the Q-Former alone (BLIP-2, arXiv 2301.12597; InstructBLIP, arXiv 2305.06500)."""

from __future__ import annotations

from vlmlab.connector.query_transformer import QueryTransformer


class QFormerConnector(QueryTransformer):
    """One visual token per learned query; takes the arguments of ``QueryTransformer``."""
