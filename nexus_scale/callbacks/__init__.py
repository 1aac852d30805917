"""Work done every N steps. Each file is one callback, found by its name; it knows neither the loop nor another callback.

Figures meet on `context`, a plain dict that one run's callbacks share: whoever measures something puts it there by name, and
Metrics moves it into the row of that step. Names are the same on all ranks.
"""
