"""The deployment engine: one SuperLink, SuperNodes on other machines, TLS, and a key for every node.

``credentials`` and ``folders`` are what its machines have; ``processes`` starts and ends SuperLink and SuperNodes;
``engine`` submits a run, follows it and reads it back. ``docs/deployment.md``
has the steps for several machines.
"""
