"""The generator: executes a plan against one server and records what happens.

One process runs ``worker``; it has its share of the plan's apiservers (``apiserver``), each with
caches kept by list and watch (``watching``), and of its actors (``actor``), woken by ``ticker``.
"""
