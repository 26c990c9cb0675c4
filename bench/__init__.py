"""The benchmark: named cases, peers, an interleaved method, and reports.

Installed as ``qkv_fast.bench``; run as ``qkv-fast`` (self-check and a short table) or ``qkv-fast bench``.
Data flows one way: cases -> work -> peers, method -> runner -> report. `README.md` beside this file says how
to read the figures and how to add a case or a peer.
"""
