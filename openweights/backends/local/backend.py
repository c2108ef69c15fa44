"""The store on this machine: a SQLite database and a folder, used by several processes at once.

It needs no server and no set-up: the first use creates the folder. Its workers run on the same
machine, so they take every job, whatever image, hardware, GPU memory or cloud type it asks for, and
a worker that dies is noticed at once by the lock that it held (`embedded.worker_locks`).

    home/openweights.db      jobs, runs, events, records of files, workers
    home/files/              content of files
    home/logs/<run>.log      what jobs printed
    home/workers/<id>.lock   held by living workers
"""

from __future__ import annotations

from openweights.backends.local.file_verbs import FileVerbs
from openweights.backends.local.job_verbs import JobVerbs
from openweights.backends.local.retention import RetentionVerbs
from openweights.backends.local.run_verbs import RunVerbs
from openweights.backends.local.worker_verbs import WorkerVerbs


class LocalBackend(FileVerbs, JobVerbs, RunVerbs, WorkerVerbs, RetentionVerbs):
    """`Backend` on this machine: see `Store` for its arguments, `Backend` for its verbs.

    One object serves many threads, also after a fork. Opening it does no I/O.
    """
