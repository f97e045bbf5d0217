"""Programs that segflow is compared with, each run as a process of its own: `python -m benchmarks.peers.NAME`.

Those that say how long their work took print it as a JSON object: `seconds` and `cpu` of the work alone, `peak` in MiB
with everything that was in memory then.
"""
