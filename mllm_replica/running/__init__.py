"""Units as processes: engine, journal, runner, tracker, reports."""
