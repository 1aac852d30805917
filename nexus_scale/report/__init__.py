"""runs/<name>/report.html and results.json."""
