"""Fine-tune a pretrained encoder on GLUE over a grid and five seeds, and report the median of the best configuration.

``grid.py`` checks everything, has ``data.py`` read and tokenise each task of ``tasks.py`` once, and puts one waiting
trial per grid cell into the Optuna storage (``study.py``). Worker processes (``workers.py``) claim the trials, start
each from the weights of ``model.py``, run it (``trial.py``, scored by ``metrics.py``) and record it. ``results.py``
turns the storage into ``results.json``, and ``report.py`` with ``plots.py`` turns that into the report.
"""
