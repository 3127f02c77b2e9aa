"""The storms: what agents do to a control plane's store, as plans that can be repeated.

Each module is one storm. Its docstring states the theory: who writes what, how many writes one unit
of work costs, what is asked of the store beyond the common judges. It offers

- ``NAME``, ``SUMMARY``, and ``RATE``, the parameter that scales its load;
- ``Parameters``, a frozen dataclass of numbers that a user may change one by one, each with a
  docstring, which is what the command says of it, and with bounds in ``registry.BOUNDS``;
- ``PRESETS``: parameters for xs (a CI run of 30 s on two cores), s, m and l;
- ``schedule(parameters, duration_us, draw)``: the plan, from its own ``random.Random`` alone;
- ``checks(records, parameters)``: verdicts of its own, beside the common judges;
- ``measures(records, parameters)``: figures of its own by name, lower is better.
"""

from bench.storms.registry import STORMS, Storm, bounds, find, meanings, parse_parameters, told

__all__ = ["STORMS", "Storm", "bounds", "find", "meanings", "parse_parameters", "told"]
