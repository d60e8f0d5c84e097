"""What people touch: the command line, the dashboard, the pipeline."""
