"""The deployment engine: one SuperLink, SuperNodes on other machines, TLS, and a key for every node.

``docs/deployment.md`` has the steps for several machines.
"""
