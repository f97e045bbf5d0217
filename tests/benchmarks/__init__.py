"""Benchmarks, run by hand: seconds and memory of whole processes, as ratios that were taken in one run.

__main__  what to run, at what size            monai, bare, own, sweep, overhead, million, scaling   one table each
measure   a process: seconds, CPU, peak        peers/     the programs that segflow is compared with, each on its own
segflow   the command as such a process        scenes, models   inputs and networks, kept in build/benchmarks
table     Markdown, and the machine            agreement  masks and scores against the whole image's
"""
