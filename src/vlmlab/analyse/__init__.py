"""Analysis of run folders: tables, intervals, figures, the report. Never imports torch."""
