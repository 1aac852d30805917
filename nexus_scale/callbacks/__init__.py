"""Work done every N steps. Each file is one callback, found by its name; it knows neither the loop nor another callback.

Callbacks of a run share figures through `context`, a plain dict: a callback adds what it measured by name, and
Metrics moves it into the row of that step. Names are the same on all ranks.
"""
