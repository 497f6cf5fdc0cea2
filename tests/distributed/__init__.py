"""What runs in several processes: each module is one suite of cases, run by `worker.py`."""
