"""Fine-tune a pretrained encoder on GLUE over a grid and five seeds, and report the median of the best configuration.

``grid.py`` checks everything, has ``examples.py`` read and ``tokens.py`` tokenise each task of ``tasks.py`` once, and
puts one waiting trial per grid cell into the Optuna storage (``study.py``). Worker processes (``workers.py``, kept at
work by ``crew.py``) claim the trials, start each from the weights of ``model.py``, run it (``trial.py`` over
``batches.py``, scored by ``metrics.py``), keep its model while it may be the best (``kept_models.py``) and record it.
``results.py`` turns the storage into ``results.json``, ``report.py`` turns that into the report, and ``submit.py``
turns the kept models into a submission for GLUE's server.

A single run (``train.py``) is a grid of one configuration. What it and grids make, ``predict.py``, ``prune.py``,
``quantize.py`` and ``publish.py`` take, by the record that lies beside each model (``model_record.py``).
"""

import common as common  # first in a worker process too, which quietens libraries before they are imported
