"""Celery tasks that run programs, and share work among processes. No line of it knows gevent or coopos.

The broker here is a directory, so that nothing else has to run; put your own in its place.

    mkdir -p queue control
    COOPOS_PATCH=1 COOPOS_KEEP_GREENLETS=0 celery -A celery_tasks worker -P gevent -c 100 -l INFO
    python celery_tasks.py                 # in another terminal: send three tasks
"""

import multiprocessing
import signal
import subprocess

from celery import Celery

app = Celery("celery_tasks", broker="filesystem://")
app.conf.broker_transport_options = {"data_folder_in": "queue", "data_folder_out": "queue", "control_folder": "control"}
app.conf.task_ignore_result = True


@app.task
def run_program(*command):
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout


@app.task
def count(words):
    # The pool's processes inherit Celery's handler of SIGTERM. When the pool ends one of them before it has called signal.signal,
    # the log has "Warm shutdown" once.
    with multiprocessing.Pool(2, signal.signal, (signal.SIGTERM, signal.SIG_DFL)) as pool:
        return pool.map(len, words)


if __name__ == "__main__":
    run_program.delay("sleep", "1")
    run_program.delay("echo", "from a program")
    count.delay(["one", "three"])
