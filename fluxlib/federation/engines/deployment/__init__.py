"""The deployment engine: one SuperLink, SuperNodes on other machines, TLS, and a key for every node.

- ``credentials``: a certificate authority of one's own, the SuperLink's certificate, a key pair per participant,
- ``folders``: what a participant keeps in its folder: samples, device file, key,
- ``processes``: starting and ending SuperLink and SuperNodes; :class:`~processes.LocalFederation` is all of it here,
- ``executor``: a resident process that forks a participant's work, so that libraries load once,
- ``engine``: a run submitted to a SuperLink, followed, and read back,
- ``commands``: ``fluxlib deploy ...``.

``docs/deployment.md`` has the steps for several machines.
"""
