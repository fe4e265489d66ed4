"""One policy, many robots: a server that plans for all who wait, and a client that needs no torch."""
