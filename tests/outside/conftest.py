"""Puts what the outside suites did, by name and number, into pytest's summary: a test that a suite fails unpatched
on this machine, and a suite that is not installed here, must not go by in silence."""


def pytest_terminal_summary(terminalreporter):
    lines = [
        line
        for reports in terminalreporter.stats.values()
        for report in reports
        for key, line in getattr(report, "user_properties", ())
        # The report of every phase carries the properties; one is enough.
        if key == "outside suite" and report.when == "call"
    ]
    if lines:
        terminalreporter.section("outside suites")
        for line in lines:
            terminalreporter.write_line(line)
