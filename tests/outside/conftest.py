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


def pytest_generate_tests(metafunc):
    """Each suite once; with --processes those that take minutes, and no others."""
    if "module" not in metafunc.fixturenames:
        return
    tables = metafunc.module
    suites = tables.PROCESS_SUITES if metafunc.config.getoption("--processes") else tables.SUITES
    only_with_left_out = "left_out" in metafunc.function.__name__
    metafunc.parametrize("module", [module for module, left_out in suites.items() if left_out or not only_with_left_out])
