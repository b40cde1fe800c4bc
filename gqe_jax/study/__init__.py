"""Studies: arms trained from several seeds each, on equal tokens, and what can be told from them."""
