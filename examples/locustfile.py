"""Load from users that run programs, as a client that isn't written in Python.

    COOPOS_PATCH=1 COOPOS_KEEP_GREENLETS=0 locust -f locustfile.py --headless -u 20 -r 20 -t 10s --processes 2

Under gevent alone each start of a program stops all users of the process for milliseconds, which count as the server's.
"""

import subprocess
import time

from locust import User, constant, task


class ProgramUser(User):
    wait_time = constant(0.1)

    @task
    def run_program(self):
        start = time.perf_counter()
        error = None
        try:
            subprocess.run(["true"], check=True)
        except (OSError, subprocess.CalledProcessError) as exc:
            error = exc
        duration_ms = 1000 * (time.perf_counter() - start)
        self.environment.events.request.fire(
            request_type="program", name="true", response_time=duration_ms, response_length=0, exception=error
        )
